"""Checkpoint directories. A checkpoint is complete or absent, even if the process is killed while it writes one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tandem_protocol.folders import TEMPORARY, fsync
from tandem_rollout.errors import UserError

from ..ranks import has_lost_peer
from ..volumes import free_bytes, in_words

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
FORMAT = 3
"""Version of the checkpoint format. Increase it when this release cannot read the checkpoints of the last release."""
STATE_KEYS = ("step", "attempt", "facts", "record", "best", "rewrites")
"""Keys of `STATE_FILE`, besides `format`."""


def rollouts_file(rank: int, rewrites: int) -> str:
    """Return the name of the file with a rank's rollouts, after `rewrites` rewrites of the checkpoint."""
    return f"rollouts-{rank}.{rewrites}.json" if rewrites else f"rollouts-{rank}.json"


class CheckpointFailed(Exception):
    """The last checkpoint of a run cannot be written."""

    def __init__(self, step: int, run_dir: Path) -> None:
        super().__init__(
            f"the last checkpoint, of step {step}, cannot be written (see above). Fix: make {run_dir} writable, with "
            "enough space, and run the same command again. It resumes from the newest complete checkpoint."
        )


def failure_message(step: int, error: Exception, run_dir: Path, needs_bytes: int, *, exists: bool) -> str:
    """Describe a checkpoint that cannot be written, for an alert.

    Args:
        exists: the step has a checkpoint, whose rollouts cannot be replaced.
    """
    if exists:
        return (
            f"the rollouts in the checkpoint of step {step} cannot be replaced: {error}. Those that it has stay, and a "
            f"resumed run samples the others again. {run_dir} has {in_words(free_bytes(run_dir))} free. Fix: free "
            "space there."
        )
    return (
        f"the checkpoint of step {step} cannot be written: {error}. It needs about {in_words(needs_bytes)}, and "
        f"{run_dir} has {in_words(free_bytes(run_dir))} free. The run tries again at the next step, and waits after "
        "the last one. Until then a crash loses the steps since the last checkpoint. Fix: free space there, or lower "
        "trainer.checkpoint.keep."
    )


class Checkpoints:
    """The checkpoints of one run, in directories named after their step, such as `checkpoints/000020`."""

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root = root
        self._keep = keep

    def latest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        found = self._all()
        return found[-1] if found else None

    def directory(self, step: int) -> Path:
        """Return the directory of the checkpoint of `step`."""
        return self._root / f"{step:06d}"

    def staging(self, step: int) -> Path:
        """Return the directory in which the files of a checkpoint are written before `commit`."""
        return self._root / f".staging-{step:06d}"

    def begin(self, step: int) -> None:
        """Create an empty staging directory, and delete the remains of unfinished checkpoints."""
        for leftover in self._root.glob(".staging-*"):
            shutil.rmtree(leftover)
        self.staging(step).mkdir(parents=True)

    def discard(self, step: int) -> None:
        """Delete the staged files of a checkpoint that failed."""
        shutil.rmtree(self.staging(step), ignore_errors=True)

    def commit(self, step: int, *, best: int | None = None) -> None:
        """Flush the staged files to disk and make them a checkpoint with one rename.

        Then delete the oldest checkpoints, so that `keep` remain. The checkpoint of step `best` is never deleted.
        If an earlier try failed after its rename, its checkpoint stays, and only the rest is done.
        """
        staging, directory = self.staging(step), self.directory(step)
        if (directory / STATE_FILE).exists():
            self.discard(step)
        else:
            for path in [*staging.rglob("*"), staging]:
                fsync(path)
            staging.rename(directory)
        fsync(self._root)
        for old in self._all()[: -self._keep]:
            if int(old.name) != best:
                # Rename it first: a kill during rmtree must not leave a partial directory that counts as a checkpoint.
                hidden = old.rename(self._root / f".staging-old-{old.name}")
                shutil.rmtree(hidden, ignore_errors=True)

    def rewrite(self, step: int, state: str, rollouts: Sequence[str]) -> None:
        """Replace the state of the checkpoint of `step` with one rename, and so its rollouts. Nothing else changes.

        Args:
            rollouts: names of the files that `state` uses. They are in the checkpoint, under names of their own.
        """
        directory = self.directory(step)
        for name in rollouts:
            fsync(directory / name)
        staged = directory / f".{STATE_FILE}"
        staged.write_text(state)
        fsync(staged)
        staged.rename(directory / STATE_FILE)
        fsync(directory)
        _delete_other_rollouts(directory, rollouts)

    def discard_rewrite(self, step: int, rollouts: Callable[[int], Sequence[str]]) -> None:
        """Delete the files of a rewrite that failed. Those that the checkpoint of `step` uses stay.

        Args:
            rollouts: returns the names of the files with the rollouts after this many rewrites.
        """
        directory = self.directory(step)
        with suppress(OSError, UserError):  # if the state cannot be read now, all files stay
            rewrites = read_state(directory)["rewrites"]
            (directory / f".{STATE_FILE}").unlink(missing_ok=True)
            _delete_other_rollouts(directory, rollouts(rewrites))

    def _all(self) -> list[Path]:
        return sorted((path for path in self._root.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def _delete_other_rollouts(checkpoint: Path, rollouts: Sequence[str]) -> None:
    """Delete the files with rollouts that are not in `rollouts`."""
    for file in checkpoint.glob("rollouts-*"):
        if file.name not in rollouts:
            file.unlink(missing_ok=True)


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed: the disk failed for a moment, or another rank has left."""
    if isinstance(error, OSError):
        return error.errno in TEMPORARY
    return isinstance(error, RuntimeError) and has_lost_peer(error)


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Report any error in the block as an unreadable checkpoint.

    Raises:
        UserError: the block raised; names the checkpoint and the cause.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise  # not the fault of the checkpoint
    except Exception as error:  # the libraries raise many kinds of errors for a truncated file
        if _may_pass(error):
            raise
        log.debug("cannot read %s", checkpoint, exc_info=True)
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}. Fix: if a file in it is "
            "damaged, delete the checkpoint. The run then resumes from the previous one."
        ) from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the contents of `STATE_FILE`, without `format`.

    Raises:
        UserError: it cannot be read, or it has the format of another release.
    """
    with readable(checkpoint):
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
        found = state.get("format", 1)
    if found != FORMAT:
        raise UserError(
            f"the checkpoint {checkpoint} has format {found}, expected {FORMAT}: another release of Tandem wrote it. "
            "Fix: finish the run with that release, or choose another trainer.run_name. `tandem export` can extract "
            "its weights."
        )
    with readable(checkpoint):
        state = {"rewrites": 0} | state  # earlier releases did not rewrite a checkpoint
        return {key: state[key] for key in STATE_KEYS}
