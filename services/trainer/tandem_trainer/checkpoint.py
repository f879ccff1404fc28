"""Checkpoint directories: whole or not there, whenever the process is killed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
FORMAT = 2
"""Of checkpoints. Raise it whenever this release cannot read those of the one before."""
STATE_KEYS = ("step", "attempt", "facts", "record", "best")
"""Of `STATE_FILE`, besides `format`."""


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


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Say of any error in the block that a file of `checkpoint` cannot be read.

    Raises:
        UserError: names the checkpoint and the cause.
    """
    try:
        yield
    except Exception as error:  # a cut file ends in whatever its format's library raises
        log.debug("cannot read %s", checkpoint, exc_info=True)
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}. If a file in it is damaged, "
            "delete the checkpoint to go on from the one before."
        ) from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `STATE_FILE` holds.

    Raises:
        UserError: it cannot be read, or another release wrote it.
    """
    with readable(checkpoint):
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
        found = state.get("format", 1)
    if found != FORMAT:
        raise UserError(
            f"the checkpoint {checkpoint} has format {found}, expected {FORMAT}: another release of Tandem wrote it. "
            "Finish the run with that release, or choose another trainer.run_name. `tandem export` takes the weights "
            "out of it."
        )
    with readable(checkpoint):
        return {key: state[key] for key in STATE_KEYS}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
