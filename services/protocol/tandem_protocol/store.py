"""The weight store: a directory on a shared volume. One trainer writes it, and all generators read it.

    versions/000042.1/        shard-00000.safetensors … manifest.json
    LATEST                    "42.1", replaced atomically
    served/<generator>.json   the generator's lease: versions that it serves or is loading
    WRITER                    lock of the trainer that writes; contains the trainer's name

A version is written into a staging directory, flushed to disk, and then renamed. So readers see either the complete
version or nothing, even if the writer is killed.
"""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from pydantic import Field, ValidationError

from .chains import closure
from .errors import StoreError, StoreLocked, WeightsNotVisible, WeightsRefused
from .folders import fsync
from .lock import Held, exclusive
from .manifest import MANIFEST_NAME, Manifest, digest_bytes
from .messages import Kind, Message, ModelFingerprint
from .problems import summarize
from .retired import RETIRED, delete, delete_old_leases
from .staged_files import contents
from .verification import verify_files
from .version import Version
from .volume import check_lock, deleting, failed, full

ENLARGE = "enlarge the weights volume or lower trainer.publish.keep"
LEASE_S = 120.0
"""Lifetime of a lease, in seconds. A lease that was written longer ago is ignored, and so is one that is written this
far in the future: after a clock has gone back, it would never expire."""


class Lease(Message):
    """Versions that a generator serves or is loading. Retention does not delete them."""

    versions: tuple[Version, ...]
    """The versions."""
    renewed_unix_s: float = Field(default_factory=time.time)
    """When the lease was written last, in seconds since 1970."""


class WeightStore:
    """Reads and writes a weight store. Its only state is the path and the writer's lock, so creating one is cheap.

    Args:
        root: Directory of the store (`shared.weights_dir`).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._versions = root / "versions"
        self._served = root / "served"
        self._latest = root / "LATEST"
        self._writer = root / "WRITER"
        self._lock: IO[str] | None = None
        """The file that this process has locked as the writer."""

    # -- reading -------------------------------------------------------------------------------------------------

    def directory(self, version: Version) -> Path:
        """Return the directory of `version`, whether it exists or not."""
        return self._versions / f"{version.step:06d}.{version.attempt}"

    def versions(self) -> list[Version]:
        """Return all committed versions, oldest first."""
        found = []
        for path in self._versions.glob("[0-9]*"):
            with suppress(ValueError):
                version = Version.parse(path.name)
                if path == self.directory(version):  # skip copies with a similar name
                    found.append(version)
        return sorted(found)

    def latest(self) -> Version | None:
        """Return the version that was committed last. None if the store is empty.

        Raises:
            StoreError: The file `LATEST` does not contain a version.
        """
        try:
            return Version.parse(self._latest.read_text().strip())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(
                f"{self._latest}: {error}. Fix: write the newest name in {self._versions} into this file."
            ) from error

    def read(self, version: Version) -> tuple[Manifest, str]:
        """Read the manifest of `version`.

        Returns:
            The manifest and its digest.

        Raises:
            WeightsNotVisible: The version is not in the directory listing. A network file system may show it later.
            WeightsRefused: The manifest is damaged, or it belongs to another version.
        """
        directory = self.directory(version)
        # List the directory instead of opening the path: a network file system may cache that a path does not exist.
        if version not in self.versions():
            newest = ", ".join(map(str, self.versions()[-3:])) or "none"
            raise WeightsNotVisible(
                f"got no version {version} in {self._versions}; the newest there: {newest}. "
                "Fix: check that trainer and generator mount the same weights volume."
            )
        try:
            data = (directory / MANIFEST_NAME).read_bytes()
            manifest = Manifest.model_validate_json(data)
        except (OSError, ValidationError) as error:
            reason = summarize(error.errors()) if isinstance(error, ValidationError) else error
            raise WeightsRefused(
                f"the manifest of version {version} cannot be read: {reason}. Fix: publish the step again."
            ) from error
        if manifest.version != version:
            raise WeightsRefused(
                f"{directory / MANIFEST_NAME}: got the manifest of version {manifest.version}, expected {version}. "
                "Fix: publish the step again."
            )
        return manifest, digest_bytes(data)

    def verify(self, manifest: Manifest) -> None:
        """Check that every file matches the manifest in size, digest and tensor table.

        Raises:
            WeightsRefused: A file is missing or differs. The message has the file, the actual and the expected value.
        """
        verify_files(self.directory(manifest.version), manifest)

    # -- leases --------------------------------------------------------------------------------------------------

    def lease_file(self, generator_id: str) -> Path:
        """Return the file of a generator's lease, whether it exists or not."""
        return self._served / f"{generator_id}.json"

    def lease(self, generator_id: str, versions: tuple[Version, ...]) -> None:
        """Write or renew the lease of a generator.

        Args:
            generator_id: Name of the generator replica.
            versions: Versions that it serves or is loading. An empty tuple removes the lease.

        Raises:
            OSError: The store cannot be written.
        """
        path = self.lease_file(generator_id)
        if versions:
            self._served.mkdir(parents=True, exist_ok=True)
            _replace(path, Lease(versions=versions).model_dump_json().encode())
        else:
            path.unlink(missing_ok=True)

    def leased(self) -> set[Version]:
        """Return all versions that are named in a lease that was written less than `LEASE_S` ago."""
        leased: set[Version] = set()
        for path in self._served.glob("*.json"):
            with suppress(FileNotFoundError, ValidationError):  # removed since the listing, or not a lease
                lease = Lease.model_validate_json(path.read_bytes())
                if abs(time.time() - lease.renewed_unix_s) < LEASE_S:
                    leased.update(lease.versions)
        return leased

    # -- writing -------------------------------------------------------------------------------------------------

    @contextmanager
    def writer(self, holder: str) -> Iterator[None]:
        """Be the store's only writer during the `with` block.

        The kernel releases the lock when the process ends or is killed.

        Args:
            holder: Name of this process, for the message that other writers get.

        Raises:
            StoreLocked: Another process is writing the store. The message names it.
        """
        self._versions.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                self._lock = stack.enter_context(exclusive(self._writer, holder))
            except Held as error:
                raise StoreLocked(
                    f"{self.root} is being written by {error}; {holder} cannot write it too. Fix: stop that trainer, "
                    "or give this run its own shared.weights_dir."
                ) from error
            stack.callback(setattr, self, "_lock", None)
            for leftover in self._versions.glob(".staging-*"):
                delete(leftover)
            yield

    def next_attempt(self) -> int:
        """Return the attempt number for a trainer that starts now: one more than the largest in the store."""
        return max((version.attempt for version in self.versions()), default=0) + 1

    @contextmanager
    def staging(
        self, version: Version, *, needs_bytes: int, fix: str = ENLARGE, owner: bool = True, completes: bool = False
    ) -> Iterator[Path]:
        """Provide a directory for the shards of `version` during the `with` block, until `commit`.

        The directory is removed at the end of the block, in any case. If another process still writes into it, it is
        hidden, and removed after the next publication.

        Args:
            version: The version to write.
            needs_bytes: Expected size of the shards, which must be free.
            fix: What to do if the volume is full, for the message.
            owner: True in the process that holds `writer`. Others must enter after it, and leave before it commits.
            completes: The files are added to a committed version, see `complete`.

        Raises:
            StoreError: The volume is full, either at the start or while the shards are written. Or it has failed, or is
                another one than at the start.
            PermissionError: This user may not write to it.
        """
        directory = self._versions / f".staging-{version}{'-complete' if completes else ''}"
        try:
            if owner:
                check_lock(self._lock, self._writer)
                free = shutil.disk_usage(self._versions).free
                if free < needs_bytes:
                    raise full(self.root, version, f"{free / 1e6:.1f} MB free", needs_bytes, fix)
                directory.mkdir(exist_ok=True)
            yield directory
        except OSError as error:
            if error.errno is None or isinstance(error, PermissionError):
                raise
            raise failed(self.root, version, error, needs_bytes, fix) from error
        finally:
            if owner:
                with suppress(OSError):  # it is a version now, or the volume has failed
                    delete(directory)

    def commit(
        self,
        staged: Path,
        version: Version,
        *,
        run: str,
        fingerprint: ModelFingerprint,
        kind: Kind = "full",
        digests: Mapping[str, str] | None = None,
        parent: tuple[Manifest, str] | None = None,
    ) -> tuple[Manifest, str]:
        """Turn the shards in `staged` into a version: flush them to disk, rename the directory, update `LATEST`.

        Args:
            staged: The directory from `staging`, with all shards. For an adapter, also its configuration.
            version: The version to commit.
            run: Name of the training run.
            fingerprint: Fingerprint of the model. For an adapter, of its base model.
            kind: Whether this is a full model or an adapter.
            digests: File name → xxh3-128 digest, of the files that their writers have digested and flushed to disk.
                Other files are read and flushed here. It must have the digests of complete files of which only the
                delta is in `staged`.
            parent: Manifest of the version that the deltas in `staged` apply to, and its digest.

        Returns:
            The manifest and its digest.

        Raises:
            StoreError: The version already exists, or a file in `digests` is missing from `staged`, or the volume is
                another one than at the start.
        """
        check_lock(self._lock, self._writer)
        digests = digests or {}
        parts = contents(staged, version, kind, digests, parent)
        for path in parts.paths:
            if path.name not in digests:
                fsync(path)
        manifest = Manifest(
            format=2 if parts.delta else 1,
            run=run,
            version=version,
            kind=kind,
            fingerprint=fingerprint,
            files=parts.files,
            tensors=parts.tensors,
            delta=parts.delta,
        )
        data = manifest.to_bytes()
        _replace(staged / MANIFEST_NAME, data)
        target = self.directory(version)
        if target.exists():
            raise StoreError(f"version {version} already exists in {self._versions}; a version is never overwritten")
        staged.rename(target)
        fsync(self._versions)
        _replace(self._latest, f"{version}\n".encode())
        return manifest, digest_bytes(data)

    def is_being_completed(self, version: Version) -> bool:
        """Whether complete files are being added to a version. Other processes than the writer ask this."""
        name = f".staging-{version}-complete"  # a pattern lists the folder, and finds nothing if the volume was emptied
        return any(path.name == name for path in self._versions.glob(".staging-*-complete"))

    def complete(self, manifest: Manifest, staged: Path) -> None:
        """Add complete files to a version that has deltas. Its manifest stays the same.

        Args:
            manifest: Manifest of the version.
            staged: The directory from `staging`, with the files. Their writers have flushed them to disk.
        """
        target = self.directory(manifest.version)
        for path in sorted(staged.glob("*.safetensors")):
            path.rename(target / path.name)
        fsync(target)

    def retain(self, keep: int) -> list[Version]:
        """Delete old versions, except the newest `keep`, `LATEST`, leased ones, and those that they are made out of.

        Leases of generators that are gone are deleted too. A new container of a generator may have another name.

        Returns:
            The deleted versions.

        Raises:
            StoreError: The volume has failed.
        """
        with deleting(self.root):
            delete_old_leases(self._served)
            versions = self.versions()
            kept = closure(self, {*versions[-keep:], *self.leased(), *filter(None, [self.latest()])})
            removed = [version for version in versions if version not in kept]
            for directory in [*self._versions.glob(f"{RETIRED}*"), *map(self.directory, removed)]:
                delete(directory)
            return removed


def _replace(path: Path, data: bytes) -> None:
    """Replace a small file atomically: readers see the old or the new content, even after a crash."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):  # of a process that was killed here
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)
