"""Read the costs of a step from the folder of a run."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tandem_protocol.config import ConfigError

from .costs import HALF_SPEED_AT, make_costs
from .simulation import Split, simulate

FEWEST_STEPS = 4
IDLE_SHARE = 0.02
"""If a run waited for less of its time than this, it does not show how fast its generators are."""
_SETTING = re.compile(r"^(\S+) +(.*)  # ", re.MULTILINE)
_HALF_SPEEDS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1e9)
_TOKEN_S = (1e-6, 10.0)
_BISECTIONS = 14


class Measured(NamedTuple):
    """A run, and its means per step."""

    name: str
    split: Split
    wait_s: float
    step_s: float
    values: dict[str, Any]
    """The values of `Costs` that the run shows, without `token_s`."""

    @property
    def shows_speed(self) -> bool:
        """Whether the trainer waited for the generators. Otherwise they are at least as fast as `token_s` says."""
        return self.wait_s > IDLE_SHARE * self.step_s


def read_run(folder: Path, trainer_devices: int) -> Measured:
    """Read a run.

    Raises:
        ConfigError: it is not the folder of a run, or the run has too few steps.
    """
    steps = _usual(_steps(folder))
    settings = _settings(folder)
    timings = {name: fmean(line["timings"][name] for line in steps) for name in steps[0]["timings"]}
    usual = ("wait_for_rollouts_s", "update_s", "publish_s", "other_s")
    lag = int(settings.get("trainer.max_lag", 1))
    return Measured(
        name=str(folder),
        split=Split(len(settings.get("shared.generators", "1")), trainer_devices, lag),
        wait_s=timings["wait_for_rollouts_s"],
        step_s=sum(timings[name] for name in usual),
        values={
            "num_prompts": settings.get("trainer.rollout.num_prompts", 16),
            "num_generations": settings.get("trainer.rollout.num_generations", 8),
            "lengths": _lengths(folder, steps),
            "update_s": timings["update_s"],
            "trainer_devices": trainer_devices,
            "other_s": timings["other_s"],
            **_publishing(steps, timings["publish_s"], lag),
        },
    )


def _steps(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl.

    Raises:
        ConfigError: see `read_run`.
    """
    lines = list(_lines(folder / "metrics.jsonl"))
    if not lines:
        raise ConfigError(
            f"got {folder} without steps in metrics.jsonl, expected the folder of a run, PROJECT/runs/NAME"
        )
    steps = [line for line in lines if "update_s" in line.get("timings", {})]
    if not steps:
        raise ConfigError(
            f"got {folder}, whose metrics.jsonl has no timings.update_s, expected a run of Tandem's trainer. A TRL "
            "script does not measure its updates. Fix: write the costs into a file for --costs"
        )
    if len(steps) < FEWEST_STEPS:
        raise ConfigError(
            f"got {folder} with {len(steps)} steps, expected {FEWEST_STEPS} or more. Fix: train longer: "
            "--trainer.max_steps=20"
        )
    return steps


def _usual(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the first steps, and steps with a checkpoint or an evaluation and those after them."""
    rare = [line["timings"].get("evaluate_s", 0) + line["timings"].get("checkpoint_s", 0) > 0 for line in lines]
    later = range(min(5, len(lines) // 4), len(lines))  # the first ones warm up
    usual = [lines[i] for i in later if not rare[i] and not (i and rare[i - 1])]
    return usual if len(usual) >= FEWEST_STEPS else [lines[i] for i in later]


def _publishing(steps: Sequence[dict[str, Any]], publish_s: float, lag: int) -> dict[str, float]:
    """With `max_lag` 0, the step says how long a publish takes. Otherwise most of it is behind the next update."""
    parts = [line["publish_timings"] for line in steps if line.get("publish_timings")]
    if not parts:
        return {"publish_s": publish_s, "copy_s": publish_s if lag else 0.0}
    mean = {name: fmean(part.get(name, 0.0) for part in parts) for name in parts[0]}
    return {
        "publish_s": publish_s if lag == 0 else max(publish_s, mean["total_s"]),
        "copy_s": mean["gather_s"] + mean["copy_s"],
        "pause_s": mean["pause_s"] + mean["load_s"],
    }


def _lengths(folder: Path, steps: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """The lengths of the completions in rollouts.jsonl. Without them, the mean of each step."""
    lines = _lines(folder / "rollouts.jsonl")
    found = [line["tokens"] for line in lines if line.get("tokens") and line.get("status") != "failed"]
    return tuple(found or (max(1, round(line["completion_tokens_mean"])) for line in steps))


def _settings(folder: Path) -> dict[str, Any]:
    """Read `config.resolved`: lines of `key  value  # source`."""
    try:
        text = (folder / "config.resolved").read_text()
    except OSError:
        return {}
    found = {}
    for key, value in _SETTING.findall(text):
        with suppress(ValueError, SyntaxError):
            found[key] = ast.literal_eval(value.strip())
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a file. A run may be writing it."""
    with suppress(OSError), path.open(errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def generators_speed(runs: Sequence[Measured], known: dict[str, Any]) -> dict[str, float]:
    """Find the `token_s` with which the simulated runs wait as long as the measured ones.

    With several runs, `half_speed_at` is the one with which they agree best, unless `known` has it.
    """
    fixed = "half_speed_at" in known or len(runs) == 1
    fits = []
    for half in [known.get("half_speed_at", HALF_SPEED_AT)] if fixed else _HALF_SPEEDS:
        speeds = [_token_s(run, {**run.values, **known, "half_speed_at": half}) for run in runs]
        fits.append((max(speeds) / min(speeds), {"token_s": fmean(speeds), "half_speed_at": float(half)}))
    return min(fits, key=lambda one: one[0])[1]


def _token_s(run: Measured, values: dict[str, Any]) -> float:
    """Return the `token_s` with which the simulated run waits as long as the measured one."""

    def wait_s(token_s: float) -> float:
        return simulate(make_costs({**values, "token_s": token_s}, run.name), run.split).wait_s

    if run.split.max_lag == 0:  # nothing else happens meanwhile, so the wait is in proportion
        return max(1e-9, run.wait_s / wait_s(1.0))
    low, high = _TOKEN_S
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if wait_s(middle) > run.wait_s else (middle, high)
    return math.sqrt(low * high)
