"""Add the complete files to a version with deltas, for a generator that cannot make them out of the deltas.

Every rank writes its own part, out of its copy of the last version. The main process asks the others through the
volume, because a collective operation would have to wait for the training.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tandem_protocol.errors import StoreError, TandemError
from tandem_protocol.manifest import Manifest
from tandem_protocol.store import WeightStore

from .publication import Publication

log = logging.getLogger(__name__)

STAND_BY_S = 0.2
"""Pause between two looks whether complete files are needed. A network file system reports no changes."""


class Completion:
    """The complete files of one version. They can be written until `end`, which the next version calls.

    Args:
        publication: The version.
        store: The store.
        write_complete: Writes the complete files of this rank into a folder, and returns their digests. It stops
            when the second argument returns true.
        rank: This rank.
        ranks: Number of ranks.
        timeout_s: How long the main process waits for the parts of the other ranks, in seconds.
    """

    def __init__(
        self,
        publication: Publication,
        store: WeightStore,
        write_complete: Callable[[Path, Callable[[], bool]], dict[str, str]],
        *,
        rank: int,
        ranks: int,
        timeout_s: float,
    ) -> None:
        self._publication = replace(
            publication,
            staging=partial(publication.staging, completes=True),
            writer=lambda folder, *_: write_complete(folder, publication.is_given_up.is_set),
        )
        self._store = store
        self._rank, self._ranks = rank, ranks
        self._timeout_s = timeout_s
        self._writing = threading.Lock()

    def add(self, manifest: Manifest) -> None:
        """Add the complete files of all ranks. Only the main process calls it.

        Raises:
            StoreError: The volume is full, another rank could not write its part, or the next version has begun.
        """
        with self._writing, self._publication.staging(owner=True) as folder:
            self._write()
            self._store.complete(manifest, folder)

    def stand_by(self) -> None:
        """On other ranks: write this rank's part whenever the main process adds the files, until `end`.

        It does so while the version is on its way, and later for a generator that has started again.
        """
        was_asked, reason = False, ""
        while not self._publication.is_given_up.wait(STAND_BY_S):
            try:
                is_asked = self._store.is_being_completed(self._publication.version)
                if is_asked and not was_asked:
                    with self._writing:
                        self._write()
                was_asked = is_asked
            except (TandemError, OSError) as error:  # the main process learns it, too
                was_asked = True
                if str(error) != reason and not self._publication.is_given_up.is_set():
                    log.warning("The complete files of version %s: %s", self._publication.version, error)
                reason = str(error)

    def end(self) -> None:
        """Let nobody write the files any more, because the copy that they are written from is about to change.

        Raises:
            TimeoutError: A thread still writes them, and the volume does not answer.
        """
        self._publication.is_given_up.set()
        if not self._writing.acquire(timeout=self._timeout_s):
            raise TimeoutError(
                f"the complete files of version {self._publication.version} were not written within "
                f"{self._timeout_s:g} s, so the next version cannot be published. Fix: check the weights volume, or "
                "raise trainer.publish.timeout_s."
            )
        self._writing.release()

    def _write(self) -> None:
        if self._publication.is_given_up.is_set():  # the copy may hold the next version already
            raise StoreError(f"the complete files of version {self._publication.version} are not needed any more")
        self._publication.write_behind((), rank=self._rank, ranks=self._ranks, timeout_s=self._timeout_s)
