"""The live screen of a run, and the plain output that replaces it when stdout is not a TTY: one line per step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tandem_protocol.durations import duration

from .progress import EvalResult, EventRow, Progress, StepRow

_WIDTH = 96
_ECHO_WIDTH = len("^C^C")
"""Columns left free beside the panel. A terminal echoes Ctrl-C there; without them the line would wrap."""
_SPARK_WIDTH = 40
_BLOCKS = "▁▂▃▄▅▆▇█"
_COMPLETION_CHARS = 240
_LABEL_WIDTH = 12
_SHOWN_PROBLEMS = 3
_LONG_PHASE_S = 2.0
"""A phase shows its duration once it has lasted this long. Shorter ones would only flicker."""


@dataclass(frozen=True)
class RunHeader:
    """What the screen shows of a run and never changes."""

    project: str
    model: str
    engine: str
    run_dir: str
    generator_cpus: Sequence[int]
    trainer_cpus: Sequence[int]


class Screen(Protocol):
    """Shows a run. `footer` says what the user can do, or what the demo waits for."""

    def __enter__(self) -> Screen: ...
    def __exit__(self, *_: object) -> None: ...
    def update(self, progress: Progress, footer: str) -> None: ...


class LiveScreen:
    """Redraws one panel in place, and removes it at the end."""

    def __init__(self, console: Console, header: RunHeader) -> None:
        self._console = console
        self._header = header
        self._started = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveScreen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, progress: Progress, footer: str) -> None:
        width = min(_WIDTH, self._console.width - _ECHO_WIDTH)
        self._live.update(render(progress, self._header, footer, time.monotonic() - self._started, width))


class PlainScreen:
    """Prints one line per step, per evaluation and per new footer, and one when the generator is ready."""

    def __init__(self, console: Console, header: RunHeader) -> None:
        self._console = console
        self._header = header
        self._ready = False
        self._steps = self._evals = self._events = 0
        self._footer = ""

    def __enter__(self) -> PlainScreen:
        self._print(_header(self._header).plain)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, progress: Progress, footer: str) -> None:
        if progress.was_ready and not self._ready:
            self._print("generator ready")
        steps = progress.steps.records[self._steps :]
        evals = progress.evals.records[self._evals :]
        events = [event for event in progress.events.records[self._events :] if event.level != "info" or event.state]
        records: list[StepRow | EvalResult | EventRow] = [*steps, *evals, *events]
        for record in sorted(records, key=lambda record: record.step):  # stable: a step comes before its evaluation
            self._print(_line(record, progress.max_steps))
        if footer != self._footer:
            self._print(footer)
        self._ready = progress.was_ready
        self._footer = footer
        self._steps = len(progress.steps.records)
        self._evals = len(progress.evals.records)
        self._events = len(progress.events.records)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _line(record: StepRow | EvalResult | EventRow, max_steps: int | None) -> str:
    if isinstance(record, EventRow):
        return f"{record.level} after step {record.step}: {printable(record.message)}"
    if isinstance(record, EvalResult):
        return f"eval after step {record.step}: {number(record.reward_mean)}"
    parts = [f"step {record.step}/{max_steps}", f"reward {number(record.reward_mean)}", f"version {record.version}"]
    parts += [] if record.lag_max is None else [f"lag {record.lag_max}"]
    parts += [] if record.kl_sampler is None else [f"kl_sampler {record.kl_sampler:.1e}"]
    return "  ".join([*parts, f"{record.rollout_tokens} tokens in {record.duration_s:.2f} s"])


def render(progress: Progress, header: RunHeader, footer: str, elapsed_s: float, width: int) -> RenderableType:
    """Return the complete screen."""
    return Panel(
        Group(
            _header(header),
            Text(),
            _bar(progress, elapsed_s),
            Text(),
            _learning(progress),
            Text(),
            _services(progress, header),
            *_problems(progress),
            *_sample(progress),
        ),
        title=Text.assemble(("tandem", "bold"), f" · {header.project}"),
        title_align="left",
        subtitle=Text(footer, style="dim"),
        subtitle_align="left",
        box=box.ROUNDED,
        border_style="bright_black",
        padding=(1, 2),
        width=width,
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw `values` with at most `width` characters: `▁▃▅█`. Longer series are averaged."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low = min(means)
    spread = max(means) - low
    if not spread:
        return _BLOCKS[3] * columns
    return "".join(_BLOCKS[round((mean - low) / spread * (len(_BLOCKS) - 1))] for mean in means)


def number(value: float | None) -> str:
    """Format a number with three decimals; None becomes `–`."""
    return "–" if value is None else f"{value:.3f}"


def shown(path: Path) -> str:
    """Return `path` relative to the current directory, if it is inside of it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def printable(text: str) -> str:
    """Return `text` on one line, without control characters: a sampled text must not control the terminal."""
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", "⏎"))


def _header(header: RunHeader) -> Text:
    return Text.assemble(
        ("model ", "dim"), header.model, ("   engine ", "dim"), header.engine, ("   run ", "dim"), header.run_dir
    )


def _bar(progress: Progress, elapsed_s: float) -> RenderableType:
    left = "" if progress.remaining_s is None else f" · about {duration(progress.remaining_s)} left"
    row = _rows()
    row.expand = True
    row.add_column(ratio=1)
    row.add_column(justify="right", style="dim")
    row.add_row(
        "step",
        Text.assemble((str(progress.step), "bold"), f" of {progress.max_steps or '–'}"),
        ProgressBar(total=progress.max_steps or 1, completed=progress.step, complete_style="cyan"),
        f"{duration(elapsed_s)}{left}",
    )
    return row


def _learning(progress: Progress) -> RenderableType:
    last = progress.steps.records[-1] if progress.steps.records else None
    rewards = progress.rewards
    speed = progress.recent_tokens_per_s
    speed_text = policy_text = "–"
    if last is not None:
        parts = [f"version {last.version}"]
        parts += [] if last.lag_max is None else [f"lag {last.lag_max}"]
        parts += [] if last.kl_sampler is None else [f"sampler KL {last.kl_sampler:.1e}"]
        policy_text = "   ".join(parts)
    if last is not None and speed is not None:
        speed_text = f"{speed:,.0f} tokens/s   {last.completion_tokens_mean:.1f} tokens per completion"
    rows = _rows()
    rows.add_row(
        "reward",
        Text.assemble(
            (number(rewards[-1] if rewards else None), "bold"), "  ", (sparkline(rewards, _SPARK_WIDTH), "cyan")
        ),
    )
    rows.add_row("evaluation", arrow(progress.eval_rewards))
    rows.add_row("speed", speed_text)
    rows.add_row("policy", policy_text)
    return rows


def _services(progress: Progress, header: RunHeader) -> RenderableType:
    generator = progress.generator
    status = progress.status
    requests = f"{generator.running} running, {generator.waiting} waiting" if generator.running else "idle"
    rows = _rows()
    rows.expand = True
    rows.add_column(justify="right", style="dim", ratio=1)
    state = requests if generator.ready else generator.reason
    rows.add_row("generator", _light(generator.ready, state), _cpus(header.generator_cpus))
    phase = "starting"
    if status is not None:
        since_s = time.time() - status.since_unix_s
        phase = status.phase.replace("_", " ")
        if since_s >= _LONG_PHASE_S:
            phase += f" · {duration(since_s)}"
    rows.add_row("trainer", _light(status is not None, phase), _cpus(header.trainer_cpus))
    return rows


def _problems(progress: Progress) -> list[RenderableType]:
    """The alerts that go on, and faults. Nothing if there are none."""
    if not progress.problems:
        return []
    rows = _rows()
    for event in progress.problems[-_SHOWN_PROBLEMS:]:
        style = "red" if event.level == "error" else "yellow"
        rows.add_row(Text(event.level, style=style), _shortened(printable(event.message)))
    return [Text(), rows]


def _sample(progress: Progress) -> list[RenderableType]:
    if not progress.samples.records:
        return []
    sample = progress.samples.records[-1]
    texts = (printable(text.strip()) for text in (sample.prompt, sample.completion))
    prompt, completion = map(_shortened, texts)
    rows = _rows()
    rows.add_row("sampled", Text.assemble((prompt, "dim"), (" → ", "bright_black"), completion))
    rows.add_row("", Text(f"reward {number(sample.reward)}", style="dim"))
    return [Text(), rows]


def _shortened(text: str) -> str:
    return text if len(text) <= _COMPLETION_CHARS else f"{text[:_COMPLETION_CHARS]}…"


def arrow(values: Sequence[float]) -> Text:
    """Format a series as `first → last`. A single value stands alone."""
    if len(values) < 2:
        return Text(number(values[0] if values else None))
    return Text.assemble(number(values[0]), (" → ", "dim"), (number(values[-1]), "bold"))


def _light(on: bool, doing: str) -> Text:
    return Text.assemble(("● ", "green" if on else "yellow"), printable(doing))


def _cpus(cpus: Sequence[int]) -> str:
    return f"{'CPU' if len(cpus) == 1 else 'CPUs'} {','.join(map(str, cpus))}"


def _rows() -> Table:
    """Return a table of labels and values. Labels have the same width in all blocks."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(style="dim", width=_LABEL_WIDTH)
    rows.add_column(overflow="fold")
    return rows
