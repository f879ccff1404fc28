"""The command `tandem plan`: reads the costs, compares the splits and prints them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tandem_protocol.config import ConfigError

from .costs import HALF_SPEED_AT, Costs, make_costs, read_file
from .measured import Measured, generators_speed, read_run
from .planning import Row, best, compare, reason, words

MANY_DEVICES = 1024
_OTHER_SPEEDS = (16.0, 256.0)


def plan(arguments: argparse.Namespace) -> int:
    """Print the estimate.

    Raises:
        ConfigError: a run or a cost is wrong or missing, or there are too few devices.
    """
    lags = sorted({*(arguments.max_lag or (0, 1, 4))})
    _check(arguments, lags)
    runs = [read_run(folder, arguments.run_trainer_devices) for folder in arguments.runs]
    written = read_file(arguments.costs) if arguments.costs else {}
    costs = _costs(runs, written, arguments.costs)

    def estimate(costs: Costs, lags: Sequence[int]) -> list[Row]:
        return compare(costs, arguments.devices, arguments.devices_per_generator, lags)

    rows = estimate(costs, lags)
    notes = [*_idle(runs), *_other_speeds(runs, written, best(rows), estimate)]
    shown = _as_json if arguments.json else _as_text
    shown(costs, rows, notes, arguments.runs or [arguments.costs])
    return 0


def _check(arguments: argparse.Namespace, lags: Sequence[int]) -> None:
    if not arguments.runs and not arguments.costs:
        raise ConfigError("got neither a run nor --costs. Fix: name the folder of a run, PROJECT/runs/NAME")
    for option in ("devices_per_generator", "run_trainer_devices"):
        if getattr(arguments, option) < 1:
            raise ConfigError(f"got --{option.replace('_', '-')} {getattr(arguments, option)}, expected 1 or more")
    fewest = arguments.devices_per_generator + 1
    if not fewest <= arguments.devices <= MANY_DEVICES:
        raise ConfigError(
            f"got --devices {arguments.devices}, expected {fewest} to {MANY_DEVICES}: a generator of "
            f"{arguments.devices_per_generator} and a trainer device at least"
        )
    if lags[0] < 0:
        raise ConfigError(f"got --max-lag {lags[0]}, expected 0 or more")


def _costs(runs: Sequence[Measured], written: dict[str, Any], file: Path | None, **speed: float) -> Costs:
    """Return the costs: what the file says, then what the runs show. `speed` is assumed instead of found."""
    if not runs:
        return make_costs(written, str(file))
    generator = {key: written[key] for key in ("half_speed_at", "max_num_seqs") if key in written} | speed
    found = {} if "token_s" in written else generators_speed(runs, generator)
    return make_costs({**runs[0].values, **found, **written, **speed}, str(file or runs[0].name))


def _idle(runs: Sequence[Measured]) -> Iterator[str]:
    for run in runs:
        if not run.shows_speed:
            yield (
                f"{run.name} hardly waited for its generators, which may be faster than this. Fix: measure a run with "
                "--trainer.max_lag 0"
            )


def _other_speeds(
    runs: Sequence[Measured],
    written: dict[str, Any],
    chosen: Row,
    estimate: Callable[[Costs, Sequence[int]], list[Row]],
) -> Iterator[str]:
    """Say whether the recommendation depends on `half_speed_at`, if it was assumed. One run does not show it."""
    if len(runs) > 1 or "half_speed_at" in written:
        return
    for half in _OTHER_SPEEDS:
        other = best(estimate(_costs(runs, written, None, half_speed_at=half), [chosen.split.max_lag]))
        if other.split[:2] != chosen.split[:2]:
            yield (
                f"one run does not show how generators slow down with more completions. With half_speed_at {half:.0f} "
                f"instead of {HALF_SPEED_AT:.0f}, the recommendation would be {words(other.split)}. Fix: measure a "
                "second run with another batch"
            )


def _as_json(costs: Costs, rows: Sequence[Row], notes: Sequence[str], sources: Sequence[Path]) -> None:
    chosen = best(rows)
    figures = {
        "is_estimate": True,
        "sources": [str(source) for source in sources],
        "costs": costs.model_dump(mode="json"),
        "rows": [_row(row) for row in rows],
        "recommended": _row(chosen),
        "reason": reason(chosen, rows),
        "notes": list(notes),
    }
    print(json.dumps(figures, indent=2))


def _row(row: Row) -> dict[str, Any]:
    return {
        **row.split._asdict(),
        "step_s": row.result.step_s,
        "trainer_busy": row.trainer_busy,
        "tokens_per_s": row.tokens_per_s,
        **row.result._asdict(),
    }


def _as_text(costs: Costs, rows: Sequence[Row], notes: Sequence[str], sources: Sequence[Path]) -> None:
    print(f"An estimate, with the costs of {', '.join(map(str, sources))}:")
    for line in _assumptions(costs):
        print(f"  {line}")
    chosen = best(rows)
    print(f"\n{_table(rows, chosen)}\n")
    print(f"Recommended: {words(chosen.split)} with max_lag {chosen.split.max_lag}. {reason(chosen, rows)}")
    for note in notes:
        print(f"note: {note}.")
    print("When not to trust this: docs/deploy/planning.md")


def _table(rows: Sequence[Row], chosen: Row) -> str:
    """Lay out the rows. Its last columns say where the time of a step goes."""
    cells = [_COLUMNS, *([*_cells(row), "  <-" if row is chosen else ""] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


_PARTS = ("wait", "update", "publish", "other")
_COLUMNS = ("generators", "trainers", "max_lag", "s/step", "tokens/s", "generators busy", "trainer busy", *_PARTS, "")


def _cells(row: Row) -> Iterator[str]:
    yield from map(str, row.split)
    yield f"{row.result.step_s:.3g}"
    yield f"{row.tokens_per_s:,.0f}"
    yield f"{row.result.generators_busy:.0%}"
    yield f"{row.trainer_busy:.0%}"
    for name in _PARTS:
        yield f"{getattr(row.result, f'{name}_s') / row.result.step_s:.0%}"


def _assumptions(costs: Costs) -> Iterator[str]:
    lengths = sorted(costs.drawn)
    yield (
        f"{costs.num_prompts} groups of {costs.num_generations} completions per step; lengths: mean "
        f"{costs.mean_length:.0f}, longest {lengths[-1]} tokens"
    )
    yield (
        f"generators: {costs.token_s:.2g} s per token for one completion, half the speed with "
        f"{costs.half_speed_at:.4g} more; {costs.max_num_seqs} at most"
    )
    yield (
        f"trainer: {costs.update_s:.3g} s per update on {costs.trainer_devices}; twice the devices make it "
        f"{2 * costs.trainer_efficiency:.2g} times as fast"
    )
    yield f"publish: {costs.publish_s:.2g} s, of which the trainer waits {costs.copy_s:.2g} s with max_lag 1 or more"
