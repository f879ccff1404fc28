"""A run's checkpoint as a plain Hugging Face folder: for vLLM, transformers or the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tandem_protocol.config import ConfigError
from tandem_protocol.manifest import ADAPTER_CONFIG_NAME


def export(run_dir: Path, checkpoint: str, to: Path) -> int:
    """Copy the model of `checkpoint` (`last`, `best` or a step) to the new folder `to`; returns its step.

    Raises:
        ConfigError: there is no such checkpoint, it holds no model, `to` is in use, or it cannot be written.
    """
    step = _step(run_dir, checkpoint, _steps(run_dir))
    model = _checkpoints(run_dir) / f"{step:06d}" / "model"
    if (model / ADAPTER_CONFIG_NAME).is_file():
        raise ConfigError(
            f"{model} holds an adapter, which has to be added to its base, expected `python -m tandem_trainer.merge "
            f"{model} {to}`, from the project's folder and where the trainer is installed"
        )
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"{model} holds no Hugging Face model, expected config.json in it. Choose another --checkpoint"
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is in use, expected a folder that does not exist or is empty")
    staging = to.with_name(f".{to.name}.part")
    shutil.rmtree(staging, ignore_errors=True)  # of an export that was cut short
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model, staging)
        staging.replace(to)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise ConfigError(
            f"{model} cannot be copied to {to}: {error}. Fix: see that there is room at --to, and that the "
            "checkpoint is still there (a run that goes on deletes old ones)."
        ) from error
    return step


def _checkpoints(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _steps(run_dir: Path) -> list[int]:
    steps = sorted(int(path.name) for path in _checkpoints(run_dir).glob("*") if path.name.isdigit())
    if not steps:
        raise ConfigError(
            f"{run_dir} holds no checkpoint, expected a run, PROJECT/runs/NAME, that has come to one "
            "(trainer.checkpoint.every_steps)"
        )
    return steps


def _step(run_dir: Path, checkpoint: str, steps: list[int]) -> int:
    if checkpoint == "last":
        return steps[-1]
    if checkpoint == "best":
        step: int | None = _best(run_dir, steps[-1])
    else:
        step = int(checkpoint) if checkpoint.isdecimal() else None
    if step is None or step not in steps:
        there = ", ".join(map(str, steps))
        raise ConfigError(
            f"{run_dir} holds no checkpoint {checkpoint!r}, expected last, best, or one of the steps {there}"
        )
    return step


def _best(run_dir: Path, last: int) -> int:
    """The step whose evaluation was the run's best, as the last checkpoint has it."""
    file = _checkpoints(run_dir) / f"{last:06d}" / "state.json"
    best = json.loads(file.read_text()).get("best")
    if best is None:
        raise ConfigError(
            f"{run_dir} knows no best checkpoint, expected a run with trainer.checkpoint.keep_best and "
            "trainer.eval.every_steps. Take --checkpoint last, or a step"
        )
    return int(best["step"])
