"""`tandem export`: writes a run's checkpoint as a plain Hugging Face folder, for vLLM, transformers or the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tandem_protocol.config import ConfigError
from tandem_protocol.manifest import ADAPTER_CONFIG_NAME


def export(run_dir: Path, checkpoint: str, to: Path) -> int:
    """Copy the model of `checkpoint` (`last`, `best` or a step) to the new folder `to`, and return its step.

    Raises:
        ConfigError: the checkpoint does not exist or has no model, `to` is not empty, or `to` cannot be written.
    """
    step = _step(run_dir, checkpoint, _steps(run_dir))
    model = _checkpoints(run_dir) / f"{step:06d}" / "model"
    if (model / ADAPTER_CONFIG_NAME).is_file():
        raise ConfigError(
            f"got an adapter in {model}, expected a complete model. Fix: merge it into its base model with `python -m "
            f"tandem_trainer.merge {model} {to}`. Run that in the project's folder, where the trainer is installed"
        )
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"{model} holds no Hugging Face model, expected a config.json in it. Fix: choose another --checkpoint"
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is not empty, expected a new or empty folder. Fix: choose another --to.")
    staging = to.with_name(f".{to.name}.part")
    shutil.rmtree(staging, ignore_errors=True)  # left by an export that was interrupted
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model, staging)
        staging.replace(to)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise ConfigError(
            f"{model} cannot be copied to {to}: {error}. Fix: check that there is room at --to, and that the "
            "checkpoint still exists (a run in progress deletes old ones)."
        ) from error
    return step


def _checkpoints(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _steps(run_dir: Path) -> list[int]:
    steps = sorted(int(path.name) for path in _checkpoints(run_dir).glob("*") if path.name.isdigit())
    if not steps:
        raise ConfigError(
            f"{run_dir} holds no checkpoint, expected the folder of a run, PROJECT/runs/NAME, that has written one "
            "(every trainer.checkpoint.every_steps steps)"
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
        existing = ", ".join(map(str, steps))
        raise ConfigError(
            f"{run_dir} holds no checkpoint {checkpoint!r}, expected last, best, or one of the steps {existing}"
        )
    return step


def _best(run_dir: Path, last: int) -> int:
    """Return the step with the run's best evaluation, which the last checkpoint records."""
    file = _checkpoints(run_dir) / f"{last:06d}" / "state.json"
    best = json.loads(file.read_text()).get("best")
    if best is None:
        raise ConfigError(
            f"{run_dir} has no best checkpoint, expected a run with trainer.checkpoint.keep_best and "
            "trainer.eval.every_steps. Fix: use --checkpoint last, or a step"
        )
    return int(best["step"])
