"""Checkpoint directories: whole or not there, whenever the process is killed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import UserError

STATE_FILE = "state.json"
FORMAT = 2
"""Of checkpoints. Raise it whenever this release cannot read those of the one before."""


class Checkpoints:
    """The checkpoints of one run: `checkpoints/000020`, named by their step."""

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root, self._keep = root, keep

    def latest(self) -> Path | None:
        found = self._all()
        return found[-1] if found else None

    def staging(self, step: int) -> Path:
        """Where the files of a checkpoint are written before `commit`."""
        return self._root / f".staging-{step:06d}"

    def begin(self, step: int) -> None:
        """Make the staging directory, empty; what earlier checkpoints left unfinished goes."""
        for leftover in self._root.glob(".staging-*"):
            shutil.rmtree(leftover)
        self.staging(step).mkdir(parents=True)

    def discard(self, step: int) -> None:
        """Remove what was staged for a checkpoint that failed."""
        shutil.rmtree(self.staging(step), ignore_errors=True)

    def commit(self, step: int, *, best: int | None = None) -> None:
        """Bring the staged files to disk, make them the checkpoint by one rename, and delete what is too many.

        The checkpoint of step `best` stays.
        """
        staging = self.staging(step)
        for path in [*staging.rglob("*"), staging]:
            _fsync(path)
        staging.rename(self._root / f"{step:06d}")
        _fsync(self._root)
        for old in self._all()[: -self._keep]:
            if int(old.name) != best:
                # Out of sight first: half a checkpoint must never be one.
                hidden = old.rename(self._root / f".staging-old-{old.name}")
                shutil.rmtree(hidden, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted((path for path in self._root.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `STATE_FILE` holds.

    Raises:
        UserError: it cannot be read, or another release wrote it.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {error}. Delete it to go on from the one before."
        ) from error
    if (found := state.get("format", 1)) != FORMAT:
        raise UserError(
            f"the checkpoint {checkpoint} has format {found}, expected {FORMAT}: another release of Tandem wrote it. "
            "Finish the run with that release, or choose another trainer.run_name. `tandem export` takes the weights "
            "out of it."
        )
    return state


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
