"""What must be true after an unattended run with faults, and the page that tells about it."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import safe_open

from support.faults import FAULTS, LOST
from support.unattended import STEP, Happened, Line, Unattended
from tandem_rollout.availability import REPEAT_S
from tandem_trainer.run.checkpoint import read_state

HANGS = r"generator \S+ has sent nothing for \d+ s"
STEP_SECONDS = re.compile(r"INFO +step .*  ([\d.]+) s(?:  |$)")
LOGGED_PER_STEP = 4


def problems(run: Unattended) -> list[str]:
    """Return everything that must be true after the run and is not."""
    folder = run.folder / "runs" / "default"
    steps = read_lines(folder / "metrics.jsonl")
    return [
        *wrong_ends(run),
        *wrong_steps("metrics.jsonl", [line["step"] for line in steps], [*range(1, run.steps + 1)]),
        *wrong_steps(
            "eval.jsonl",
            [line["step"] for line in read_lines(folder / "eval.jsonl")],
            sorted({*range(0, run.steps + 1, 20), run.steps}),
        ),
        *doubled_completions(read_lines(folder / "rollouts.jsonl"), steps),
        *unreadable_checkpoints(folder / "checkpoints", run.steps),
        *(f"the log says nothing of fault {n} ({e})" for n, e in enumerate_silent(run)),
    ]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines. A torn line raises."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def wrong_ends(run: Unattended) -> Iterator[str]:
    if run.exits[-1:] != [0]:
        yield f"docker compose up ended with {run.exits}, expected 0 at the end"
    for name, state in run.states.items():
        if (state["Status"], state["ExitCode"]) != ("exited", 0):
            yield f"{name} is {state['Status']} with exit status {state['ExitCode']}, expected exited with 0"


def wrong_steps(file: str, found: list[int], expected: list[int]) -> Iterator[str]:
    if found != expected:
        doubled = [step for step, count in Counter(found).items() if count > 1]
        missing = sorted({*expected} - {*found})
        yield f"{file}: {len(found)} lines, expected {len(expected)}; doubled {doubled[:9]}, missing {missing[:9]}"


def doubled_completions(lines: list[dict[str, Any]], steps: list[dict[str, Any]]) -> Iterator[str]:
    """Each step has LOGGED_PER_STEP completions, and as many for each batch that was skipped before it."""
    skipped = {line["step"]: line["groups_skipped"] for line in steps}
    for step, count in Counter(line["step"] for line in lines).items():
        if count > LOGGED_PER_STEP * (1 + skipped.get(step, 0) // 2):
            yield f"rollouts.jsonl: {count} completions of step {step}, expected {LOGGED_PER_STEP}"


def unreadable_checkpoints(folder: Path, steps: int) -> Iterator[str]:
    found = sorted(folder.glob("[0-9]*"))
    if not found or int(found[-1].name) != steps:
        yield f"the last checkpoint is {found[-1:]}, expected that of step {steps}"
    for checkpoint in found:
        assert read_state(checkpoint)["step"] == int(checkpoint.name)
        for file in checkpoint.rglob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert all(opened.get_tensor(name).isfinite().all() for name in opened.keys())  # noqa: SIM118 - no mapping
    if leftovers := [path.name for path in folder.iterdir() if path not in found]:
        yield f"the checkpoints have leftovers: {leftovers}"


def windows(run: Unattended) -> Iterator[tuple[Happened, float]]:
    """Yield each fault that ended before the run did, with the time of the next one or of the run's end."""
    last_s = max(line.at_s for line in run.lines)
    ends = [*(fault.began_s for fault in run.happened[1:]), last_s]
    for fault, end_s in zip(run.happened, ends, strict=True):
        if fault.ended_s and fault.ended_s < last_s - run.every_s / 2:
            yield fault, end_s


def evidence(run: Unattended, fault: Happened, end_s: float) -> dict[str, str | None]:
    """What the log must say about a fault → the first line that says it, or None."""
    lines = [line for line in run.lines if fault.began_s - 1 <= line.at_s <= end_s]
    kind = FAULTS[fault.kind]
    found: dict[str, str | None] = {
        f"{service}: {pattern}": next(
            (line.text for line in lines if line.service == service and re.search(pattern, line.text)), None
        )
        for service, patterns in kind.expected.items()
        for pattern in patterns
    }
    if kind.slow:
        said = (line.text for line in lines if is_about_waiting(line, run.lasts_s))
        found[f"trainer: a step of {run.lasts_s:g} s, or why it waits"] = next(said, None)
    return found


def is_about_waiting(line: Line, lasts_s: float) -> bool:
    """Whether a line says that something hung for `lasts_s` seconds. A wait is reported after 30 s."""
    if lasts_s > REPEAT_S + 5 and re.search(f"{HANGS}|{LOST}", line.text):
        return True
    return seconds_of_step(line.text) >= 0.6 * lasts_s


def seconds_of_step(text: str) -> float:
    match = STEP_SECONDS.search(text)
    return float(match[1]) if match else 0.0


def enumerate_silent(run: Unattended) -> Iterator[tuple[int, str]]:
    for number, (fault, end_s) in enumerate(windows(run), 1):
        silent = [name for name, line in evidence(run, fault, end_s).items() if line is None]
        if silent:
            yield number, f"{fault.kind}: {'; '.join(silent)}"


def longest_gap_s(run: Unattended, fault: Happened, end_s: float) -> float:
    """The longest time without a step that the fault caused, in seconds."""
    steps = [line.at_s for line in run.lines if line.service == "trainer" and STEP.search(line.text)]
    before = max((at_s for at_s in steps if at_s <= fault.began_s), default=fault.began_s)
    times = [before, *(at_s for at_s in steps if fault.began_s < at_s <= end_s)]
    return max((b - a for a, b in pairwise(times)), default=end_s - before)


def timeline(run: Unattended) -> Iterator[str]:
    """One line per fault: what happened, what the log said first, and for how long there was no step."""
    began_s = run.lines[0].at_s
    for number, (fault, end_s) in enumerate(windows(run), 1):
        said = next((line for line in evidence(run, fault, end_s).values() if line), "nothing")
        gap_s = longest_gap_s(run, fault, end_s)
        yield f"{number:3}  {fault.began_s - began_s:6.0f} s  {fault.kind:20}  {gap_s:5.1f} s without a step  {said}"


def report(run: Unattended, found: Sequence[str], command: str) -> str:
    """Return the page docs/reliability.md."""
    gaps_s: dict[str, list[float]] = defaultdict(list)
    said: dict[str, str] = {}
    for fault, end_s in windows(run):
        gaps_s[fault.kind].append(longest_gap_s(run, fault, end_s))
        lines = [line for line in evidence(run, fault, end_s).values() if line]
        said.setdefault(fault.kind, message(lines[0]) if lines else "nothing")
    rows = [
        f"| {FAULTS[kind].title} | {len(gaps)} | {statistics.median(gaps):.1f} | {max(gaps):.1f} | `{said[kind]}` |"
        for kind, gaps in sorted(gaps_s.items(), key=lambda item: [*FAULTS].index(item[0]))
    ]
    return PAGE.format(
        date=datetime.now(UTC).date(),
        machine=f"{os.cpu_count()} cores ({platform.machine()})",
        minutes=round((run.lines[-1].at_s - run.lines[0].at_s) / 60),
        steps=f"{run.steps:,}",
        faults=sum(map(len, gaps_s.values())),
        every_s=run.every_s,
        lasts_s=run.lasts_s,
        seed=run.seed,
        starts=len(run.exits),
        rows="\n".join(rows),
        result="".join(f"- **{problem}**\n" for problem in found) or "All of this held.\n",
        command=f'make reliability ARGS="{command}"',
    )


def message(line: str) -> str:
    """A line of the log without its time and level, short enough for a table."""
    text = re.sub(r"^\S+ \S+ [A-Z]+ +", "", line).replace("|", "/")
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"


PAGE = """\
# Reliability

This page shows how a run under Compose behaves when nobody watches it and something fails all the time. A script
starts the run, causes the faults, checks the result and writes this page. [What happens when something
fails](deploy/failures.md) explains what you see here.

## The run

| | |
|---|---|
| date, machine | {date}, {machine}, without a GPU, with other work on it |
| services | a trainer, and two generators with the mock engine |
| supervisor | [the documented unit](deploy/containers.md#after-a-reboot): it runs `scripts/up` again when that fails |
| length | {steps} steps in {minutes} minutes, with a checkpoint and an evaluation every 20 steps |
| faults | {faults}, in the order of seed {seed}; those that last take {lasts_s:g} s |
| between two faults | the run has made a step again, and then {every_s:g} s pass |
| starts of the unit | {starts} |

## The faults

"Without a step" is the longest time between two steps, from the fault to the next one, in seconds. It includes the time
that the fault lasts.

| fault | count | without a step, median | max | the first line of the log about it |
|---|---:|---:|---:|---|
{rows}

## What was checked

- The last start ends by itself with exit status 0, and so does every container.
- `metrics.jsonl` has each step once. `eval.jsonl` has each evaluation once. `rollouts.jsonl` has no completion twice.
  No line is torn.
- Every checkpoint can be read, and the last one is of the last step.
- For each fault, the services' logs have the lines that a reader needs to know what happened.

{result}
## Repeat it

This needs a Docker engine and the images with the mock generator:

```sh
TANDEM_GENERATOR_TARGET=mock docker compose build
{command}
```

The full length, three hours with a fault every two minutes:

```sh
make reliability ARGS="--hours 3 --fault-every-s 120"
```
"""
LONGEST_MESSAGE = 90
