"""Decide whether a version is published as a delta, that is, as the words that differ from the version before it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from tandem_protocol.chains import is_complete, sources
from tandem_protocol.errors import TandemError
from tandem_protocol.manifest import Manifest
from tandem_protocol.memory import available_bytes, is_in_memory
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient

from .publication import Part, Writer
from .published_copy import Files, Plan, PublishedCopy
from .ranks import together

log = logging.getLogger(__name__)

MAX_CHAIN = 0.5
"""Deltas after a complete version may have this fraction of its bytes, manifests included."""
MAX_LENGTH = 32
"""The most deltas after a complete version. A replica that starts reads all of them."""
MAX_REFUSALS = 3
"""After this number of refused deltas, the run publishes complete versions only. If the first delta is refused, one is
enough: the generators had its base, so they can make none."""
PROTOCOL = 2
"""The contract from which on generators read manifests with deltas. Earlier ones refuse the complete files as well."""
SLOW_BYTES_PER_S = 500e6
"""`auto`: Volumes that are written more slowly than this get deltas."""
MIN_BYTES = 64 << 20
"""`auto`: Smaller versions are never published as deltas."""
TRIED = 3
"""`auto`: The fastest of the first three complete versions counts, because other work may delay one."""
FREE = 2
"""`auto`: The trainer's machine must have memory for this number of complete versions. One is the copy."""


class Deltas:
    """The main process decides. Every rank writes the deltas of its own files.

    Args:
        mode: `trainer.publish.delta`.
        dtype: The dtype of published parameters.
        store: The store.
        accelerator: The ranks.
        client: The generators' client, which knows the oldest version of the contract that they speak.
    """

    def __init__(
        self, mode: str, dtype: torch.dtype, store: WeightStore, accelerator: Accelerator, client: GeneratorClient
    ) -> None:
        self._store = store
        self._accelerator = accelerator
        self._client = client
        self._is_off = mode == "never" or dtype.itemsize != 2  # the same on every rank
        self._is_measured = mode == "auto"
        self._speeds_bytes_per_s: list[float] = []
        self._copy: PublishedCopy | None = None
        self._files: list[str] = []
        self._last: tuple[Manifest, str] | None = None
        self._is_whole = True
        self._chain_bytes = self._chain_length = self._delta_bytes = self._refusals = 0
        self._is_one_served = False
        self._said = ""

    def plan(self, version: Version, part: Part) -> Plan | None:
        """Return what to write of `version`. None: the complete files, and no copy is kept.

        Every rank calls it at the same time, and gets the plan of the main process.
        """
        if self._is_off or part.kind == "lora":
            return None
        plans: list[Plan | None] = [None]

        def decide() -> None:
            if self._accelerator.is_main_process:
                plans[0] = self._plan(version, part.version_bytes)

        together(self._accelerator, decide)
        broadcast_object_list(plans)
        if plans[0] is None:
            self._copy = None  # it would take memory for nothing
        else:
            together(self._accelerator, self._make_copy, part.files)
        return plans[0]

    def writer(self, plan: Plan | None) -> Writer | None:
        """Return what writes this rank's files. None: without a copy."""
        return partial(self._copy.write, plan=plan) if plan and self._copy else None

    def parent(self, plan: Plan | None) -> tuple[Manifest, str] | None:
        """The manifest of the version that deltas apply to, and its digest."""
        return self._last if plan and plan.parent else None

    def write_complete(self, directory: Path, is_given_up: Callable[[], bool]) -> dict[str, str]:
        """Write the complete files of this rank's copy."""
        return self._copy.write_complete(directory, is_given_up) if self._copy else {}

    def committed(self, manifest: Manifest, digest: str, write_s: float) -> int:
        """Note the version that is the next one's parent. Returns how many bytes were written."""
        self._last = manifest, digest
        delta_bytes = sum(delta.size_bytes for delta in manifest.deltas.values())
        if is_complete(self._store, manifest):
            self._completed()
            if not manifest.delta:
                self._speeds_bytes_per_s.append(manifest.size_bytes / max(write_s, 1e-9))
            return manifest.size_bytes + delta_bytes
        whole = sum(file.size_bytes for file in manifest.files if file.name not in manifest.deltas)
        self._delta_bytes = delta_bytes + whole
        self._chain_bytes += delta_bytes + whole + len(manifest.to_bytes())
        self._chain_length += 1
        return delta_bytes + whole

    def look(self) -> None:
        """Look whether the store has all files that the last version is made out of, for a generator that starts.

        If a file is missing, the next version has its complete files. This reads the manifests of the chain, so it
        must not run in the learner's time.
        """
        if self._last is None:
            return
        try:
            sources(self._store, self._last[0])
        except TandemError:
            self._is_whole = False
        else:
            self._is_whole = True

    def served(self) -> None:
        """Note that all generators serve the last version. If its deltas were refused, it begins a new chain."""
        self._is_one_served |= self._chain_length > 0

    def refused(self, manifest: Manifest, error: Exception) -> None:
        """Note that a generator could not make the complete files. They are added to the version."""
        self._completed()
        self._refusals += 1
        more = " From now on, all versions are published in full." if self._is_given_up else ""
        log.warning("Version %s is now published in full, because a generator refused its deltas: %s%s",
                    manifest.version, error, more)  # fmt: skip

    @property
    def _is_given_up(self) -> bool:
        return self._refusals >= (MAX_REFUSALS if self._is_one_served else 1)

    def _completed(self) -> None:
        self._chain_bytes = self._chain_length = 0

    def _plan(self, version: Version, version_bytes: int) -> Plan | None:
        if self._is_given_up or (self._is_measured and not self._gains(version_bytes)):
            return None
        if self._client.protocols.oldest < PROTOCOL:
            return None
        if self._last is None:
            return Plan(version)
        is_long = (
            self._chain_length + 1 >= MAX_LENGTH or self._chain_bytes + self._delta_bytes > MAX_CHAIN * version_bytes
        )
        return Plan(version, self._last[0].version, complete=is_long or not self._is_whole)

    def _gains(self, version_bytes: int) -> bool:
        """The rule of `auto`. A volume in memory is that of one machine, and a delta gains nothing there."""
        if self._copy:
            return True
        speeds = self._speeds_bytes_per_s[:TRIED]
        if version_bytes < MIN_BYTES or len(speeds) < TRIED or max(speeds) >= SLOW_BYTES_PER_S:
            return False
        if is_in_memory(self._store.root):
            return False
        available = available_bytes()
        has_memory = available is None or available >= FREE * version_bytes
        self._say(
            f"The weights volume was written at {max(speeds) / 1e6:.0f} MB/s. "
            + (
                "From now on, only what changes is published (trainer.publish.delta: auto)."
                if has_memory
                else f"Versions stay complete, because only what changes is published if this machine has "
                f"{FREE * version_bytes / 1e9:.1f} GB of free memory."
            )
        )
        return has_memory

    def _say(self, text: str) -> None:
        if text != self._said:
            log.info("%s", text)
        self._said = text

    def _make_copy(self, files: Files) -> None:
        if self._copy is None or self._files != [*files]:
            self._copy, self._files = PublishedCopy(files), [*files]
