"""The folder of a run: its lock, what becomes of an earlier run, and where its weights are."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem_protocol.config import ConfigError
from tandem_protocol.folders import require_writable
from tandem_protocol.lock import Held, exclusive, has_owner
from tandem_protocol.run_state import LOCK_FILE

_MEMORY = Path("/dev/shm")  # noqa: S108 – mkdtemp creates the weight store's directory in it
_STORE_TO_MODEL = 8
"""Bytes of the weight store per byte of the model: up to four versions, in fp32 even if the model is bf16."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def logs_dir(self) -> Path:
        return self.path / "logs"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run, so that no other command writes it. The kernel releases the lock when this process ends.

        Raises:
            ConfigError: another command holds the lock, or the run's folder cannot be written to.
        """
        require_writable(self.path.parent, "trainer.output_dir")
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self._command_lock, "a `tandem` command"))
            except Held as error:
                raise ConfigError(
                    f"{self.path} is being written by another `tandem` command. Fix: end it, or give this run another "
                    "name: --trainer.run_name=NAME."
                ) from error
            yield

    @property
    def _command_lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def is_in_use(self) -> bool:
        """Whether a trainer or a `tandem` command writes the run now.

        Raises:
            OSError: a lock cannot be read.
        """
        return has_owner(self.path / LOCK_FILE) or has_owner(self._command_lock)

    def set_aside(self) -> Path | None:
        """Rename the folder to the first free of `name.1`, `name.2` …, and return it.

        Returns None if the run does not exist.
        """
        if not self.path.exists():
            return None
        names = (self.path.with_name(f"{self.path.name}.{n}") for n in itertools.count(1))
        return self.path.rename(next(name for name in names if not name.exists()))

    @contextmanager
    def weights_dir(self, model: Path) -> Iterator[Path]:
        """Create a directory for the weight store and remove it afterwards.

        It is in memory if the model is a local folder and memory has room for its versions, else in the run's folder.
        """
        size_bytes = sum(shard.stat().st_size for shard in model.glob("*.safetensors"))
        room_bytes = shutil.disk_usage(_MEMORY).free if os.access(_MEMORY, os.W_OK) else 0
        in_memory = 0 < size_bytes * _STORE_TO_MODEL <= room_bytes
        with tempfile.TemporaryDirectory(
            prefix="tandem-weights-", dir=_MEMORY if in_memory else self.path, ignore_cleanup_errors=True
        ) as directory:
            yield Path(directory)
