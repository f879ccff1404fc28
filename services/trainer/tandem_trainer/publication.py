"""One version on its way: the parts that the ranks write, and what happens when all are written.

Threads run this behind the training, so nothing here is a collective operation. Ranks that write behind the training
tell the main process the digests of their files in the staging folder.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tandem_protocol.errors import StoreError
from tandem_protocol.manifest import DELTA_SUFFIX
from tandem_protocol.messages import Kind, ServedWeights, SwitchTimings
from tandem_protocol.version import Version

from .learner.safetensors_file import write_files
from .published_copy import Plan
from .run.clock import PhaseClock

POLL_S = 0.01
"""Pause between two looks for the other ranks' parts. A network file system reports no changes."""


Writer = Callable[[Path, Mapping[str, Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]], dict[str, str]]
"""Writes tensors into the files of a folder. Takes and returns the same as `write_files`."""


class Part(NamedTuple):
    """What one rank writes of a version."""

    kind: Kind
    files: Mapping[str, Mapping[str, Tensor]]
    """File name → its table."""
    tensors: Iterator[tuple[str, Tensor]]
    """All tensors of the version. Every rank takes them at the same time, because they may have to be gathered."""
    version_bytes: int
    """Size of all tensors of the version, on all ranks."""

    @property
    def table(self) -> dict[str, Tensor]:
        """The tensors that this rank writes, without data."""
        return {name: tensor for table in self.files.values() for name, tensor in table.items()}

    def own(self, clock: PhaseClock, copy: Callable[[str, Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's tensors in host memory.

        Args:
            copy: Copies a tensor into host memory.
        """
        names = self.table.keys()
        for name, tensor in clock.each("gather", self.tensors):
            if name in names:
                with clock.phase("copy"):
                    on_host = copy(name, tensor)
                yield name, on_host


@dataclass
class Publication:
    """A version whose tensors leave the model."""

    version: Version
    part: Part
    staging: Callable[..., AbstractContextManager[Path]]
    """Gives the staging folder. Turns the error of a full volume into one that says how to enlarge it."""
    plan: Plan | None = None
    """What is written as a delta. None: nothing."""
    writer: Writer | None = None
    """What writes the files, if not `write_files`."""
    clock: PhaseClock = field(default_factory=PhaseClock)
    began_s: float = field(default_factory=time.monotonic)
    is_given_up: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the version any more, so that no thread does."""

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
        """Write this rank's files. Returns file name → digest.

        Raises:
            StoreError: The volume is full.
        """
        with self.clock.phase("write"), self.staging() as staged:
            return (self.writer or write_files)(staged, self.part.files, tensors)

    def write_behind(
        self, tensors: Iterable[tuple[str, Tensor]], *, rank: int, ranks: int, timeout_s: float
    ) -> dict[str, str]:
        """Write this rank's files while the model is trained.

        Returns:
            File name → digest: of all ranks on rank 0, of this rank's files on others.

        Raises:
            StoreError: The volume is full, or another rank could not write its part, or not in time.
        """
        try:
            digests = self.write(tensors)
        except Exception:
            if rank:
                self._remove_files()  # on a full volume, the announcement needs their space
                self._announce(rank, None)
            else:
                with suppress(StoreError):
                    self._collect(ranks, timeout_s)  # they still write into the folder, which this process removes
            raise
        if rank:
            self._announce(rank, digests)
            return digests
        return digests | self._collect(ranks, timeout_s)

    def _remove_files(self) -> None:
        with self.staging() as staged:
            for name in self.part.files:
                (staged / name).unlink(missing_ok=True)
                (staged / f"{name}{DELTA_SUFFIX}").unlink(missing_ok=True)

    def _announce(self, rank: int, digests: Mapping[str, str] | None) -> None:
        """Say that this rank's part is written, or with None that it could not be."""
        with self.staging() as staged:
            temporary = staged / f"{_name(rank)}.new"
            temporary.write_text(json.dumps(digests))
            temporary.rename(staged / _name(rank))

    def _collect(self, ranks: int, timeout_s: float) -> dict[str, str]:
        """Wait for the parts of the other ranks. Returns the digests of their files."""
        deadline = time.monotonic() + timeout_s
        missing = {_name(rank): rank for rank in range(1, ranks)}
        parts: dict[int, dict[str, str] | None] = {}
        with self.clock.phase("write"), self.staging() as staged:
            while missing:
                # List the folder, because a network file system may cache that a file does not exist.
                for name in missing.keys() & {path.name for path in staged.iterdir()}:
                    parts[missing.pop(name)] = json.loads((staged / name).read_text())
                    (staged / name).unlink()
                if missing and time.monotonic() > deadline:
                    raise StoreError(
                        f"trainer process {min(missing.values())} did not write its part of version {self.version} "
                        f"into {staged} within {timeout_s:g} s. Fix: mount the same weights volume at "
                        "shared.weights_dir for all trainer processes, or raise trainer.publish.timeout_s."
                    )
                if missing and self.is_given_up.wait(POLL_S):
                    raise StoreError(f"version {self.version} was given up before all of it was written")
        found: dict[str, str] = {}
        for rank, digests in parts.items():
            if digests is None:
                raise StoreError(f"trainer process {rank} could not write its part of version {self.version}")
            found |= digests
        return found

    def timings(self, served: Iterable[ServedWeights]) -> dict[str, float]:
        """Return the seconds of each phase. Those of the switch are of the generator that took longest."""
        switches = [answer.timings for answer in served if answer.timings]
        none = SwitchTimings(verify_s=0.0, pause_s=0.0, load_s=0.0, total_s=0.0)
        slowest = max(switches, key=lambda switch: switch.total_s, default=none)
        return {f"{phase}_s": self.clock.seconds[phase] for phase in ("gather", "copy", "write", "commit")} | {
            "visible_s": slowest.visible_s,
            "verify_s": slowest.verify_s - slowest.visible_s,
            "pause_s": slowest.pause_s,
            "load_s": slowest.load_s,
            "total_s": time.monotonic() - self.began_s,
        }


def _name(rank: int) -> str:
    return f".part-{rank:05d}.json"
