"""The weight store: a directory on a volume that one trainer writes and every generator reads.

    versions/000042.1/  shard-00000.safetensors … manifest.json
    LATEST              "42.1", replaced atomically
    served/<generator>  the versions a generator holds or is loading (its lease)
    WRITER              locked by the one trainer that may write; its content names the holder

A version appears by one rename of a directory that is complete and on disk, so no reader ever sees half of one,
whenever the writer is killed.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import Field, ValidationError

from .errors import StoreError, StoreLocked, WeightsNotVisible, WeightsRefused
from .lock import Held, exclusive
from .manifest import (
    ADAPTER_CONFIG_NAME,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    digest_bytes,
    digest_file,
    read_header,
)
from .messages import Kind, Message, ModelFingerprint
from .problems import summarize
from .version import Version

LEASE_S = 120.0
"""A lease that has not been renewed for so long belongs to a generator that is gone."""


class Lease(Message):
    """The versions that a generator holds or is loading: retention leaves them alone."""

    versions: tuple[Version, ...]
    renewed_unix_s: float = Field(default_factory=time.time)


class WeightStore:
    """Reader and writer of one store; cheap to make, holds no state but its path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._versions = root / "versions"
        self._served = root / "served"
        self._latest = root / "LATEST"

    # -- reading -------------------------------------------------------------------------------------------------

    def directory(self, version: Version) -> Path:
        return self._versions / f"{version.step:06d}.{version.attempt}"

    def versions(self) -> list[Version]:
        """All committed versions, oldest first."""
        found = []
        for path in self._versions.glob("[0-9]*"):
            with suppress(ValueError):
                version = Version.parse(path.name)
                if path == self.directory(version):  # not somebody's copy under a like name
                    found.append(version)
        return sorted(found)

    def latest(self) -> Version | None:
        """The version committed last; None in an empty store.

        Raises:
            StoreError: LATEST says something else than a version.
        """
        try:
            return Version.parse(self._latest.read_text().strip())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{self._latest}: {error}. Write the newest name in {self._versions} into it.") from error

    def read(self, version: Version) -> tuple[Manifest, str]:
        """The manifest of `version` and its digest.

        Raises:
            WeightsNotVisible: the version is not in the listing (yet: a network file system may be late).
            WeightsRefused: its manifest cannot be read.
        """
        directory = self.directory(version)
        # The listing, not a look-up: a network file system may have cached that the name does not exist.
        if version not in self.versions():
            newest = ", ".join(map(str, self.versions()[-3:])) or "none"
            raise WeightsNotVisible(
                f"got no version {version} in {self._versions}; the newest there: {newest}. "
                "Check that trainer and generator mount the same weights volume."
            )
        try:
            data = (directory / MANIFEST_NAME).read_bytes()
            manifest = Manifest.model_validate_json(data)
        except (OSError, ValidationError) as error:
            reason = summarize(error.errors()) if isinstance(error, ValidationError) else error
            raise WeightsRefused(
                f"the manifest of version {version} cannot be read: {reason}. Fix: publish again."
            ) from error
        if manifest.version != version:
            raise WeightsRefused(f"{directory / MANIFEST_NAME} is of version {manifest.version}, wanted {version}")
        return manifest, digest_bytes(data)

    def verify(self, manifest: Manifest) -> None:
        """Compare every file with the manifest: present, size, digest, tensor table.

        Raises:
            WeightsRefused: names the file, what was got and what was wanted.
        """
        directory = self.directory(manifest.version)
        found: list[TensorEntry] = []
        for entry in manifest.files:
            path = directory / entry.name
            try:
                size = path.stat().st_size
                if size != entry.size_bytes:
                    raise _refused(path, f"{size} bytes", f"{entry.size_bytes}")
                if (digest := digest_file(path)) != entry.xxh3_128:
                    raise _refused(path, f"xxh3-128 {digest}", entry.xxh3_128)
                if path.name != ADAPTER_CONFIG_NAME:
                    found += read_header(path)
            except (OSError, ValueError) as error:
                raise _refused(path, str(error), "the file that the manifest names") from error
        if sorted(found, key=lambda t: t.name) != sorted(manifest.tensors, key=lambda t: t.name):
            raise _refused(directory, "another tensor table in the shards' headers", "the manifest's")

    # -- leases --------------------------------------------------------------------------------------------------

    def lease(self, generator_id: str, versions: tuple[Version, ...]) -> None:
        """State (or renew) which versions `generator_id` needs; an empty tuple gives the lease back."""
        path = self._served / f"{generator_id}.json"
        if versions:
            self._served.mkdir(parents=True, exist_ok=True)
            _replace(path, Lease(versions=versions).model_dump_json().encode())
        else:
            path.unlink(missing_ok=True)

    def leased(self) -> set[Version]:
        """All versions that a live lease names."""
        leased: set[Version] = set()
        for path in self._served.glob("*.json"):
            with suppress(FileNotFoundError, ValidationError):  # given back after the listing; no lease of ours
                lease = Lease.model_validate_json(path.read_bytes())
                if time.time() - lease.renewed_unix_s < LEASE_S:
                    leased.update(lease.versions)
        return leased

    # -- writing -------------------------------------------------------------------------------------------------

    @contextmanager
    def writer(self, holder: str) -> Iterator[None]:
        """Be the store's only writer. The lock is the kernel's, so a killed trainer leaves none behind.

        Raises:
            StoreLocked: another process holds it; the message names the holder.
        """
        self._versions.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self.root / "WRITER", holder))
            except Held as error:
                raise StoreLocked(
                    f"{self.root} is being written by {error}; {holder} cannot write it too. Stop that trainer, or "
                    "give this run its own shared.weights_dir."
                ) from error
            for leftover in self._versions.glob(".staging-*"):
                shutil.rmtree(leftover)
            yield

    def next_attempt(self) -> int:
        """The number of the next incarnation of the trainer: one more than any version in the store has."""
        return max((version.attempt for version in self.versions()), default=0) + 1

    @contextmanager
    def staging(self, version: Version, *, needs_bytes: int, owner: bool = True) -> Iterator[Path]:
        """A directory to write the shards of `version` into before `commit`; gone afterwards whatever happens.

        Args:
            owner: False in the processes that only help the one that holds `writer`: they enter after it and leave
                before it commits.

        Raises:
            StoreError: the volume is full, before or while writing.
        """
        directory = self._versions / f".staging-{version}"
        if owner:
            free = shutil.disk_usage(self._versions).free
            if free < needs_bytes:
                raise _full(self.root, version, f"{free / 1e6:.1f} MB free", f"{needs_bytes / 1e6:.1f} MB")
            directory.mkdir(exist_ok=True)
        try:
            yield directory
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(self.root, version, str(error), f"{needs_bytes / 1e6:.1f} MB") from error
            raise
        finally:
            if owner:
                shutil.rmtree(directory, ignore_errors=True)

    def commit(
        self,
        staged: Path,
        version: Version,
        *,
        run: str,
        fingerprint: ModelFingerprint,
        kind: Kind = "full",
        digests: Mapping[str, str] | None = None,
    ) -> tuple[Manifest, str]:
        """Make the shards in `staged` version `version`: all on disk first, then one rename, then LATEST.

        Args:
            digests: file name → digest, of files whose writers know it; the others are read again.

        Raises:
            StoreError: that version exists already, or a file that `digests` names is not in `staged`.
        """
        digests = digests or {}
        shards = sorted(staged.glob("*.safetensors"))
        configs = [staged / ADAPTER_CONFIG_NAME] if kind == "lora" else []
        if lost := digests.keys() - {shard.name for shard in shards}:
            raise StoreError(
                f"{min(lost)} of version {version} was written but is not in {staged}, expected one weights "
                "volume that all trainer processes mount at shared.weights_dir"
            )
        for path in [*shards, *configs]:
            _fsync(path)
        manifest = Manifest(
            run=run,
            version=version,
            kind=kind,
            fingerprint=fingerprint,
            files=tuple(
                FileEntry(name=p.name, size_bytes=p.stat().st_size, xxh3_128=digests.get(p.name) or digest_file(p))
                for p in [*shards, *configs]
            ),
            tensors=tuple(tensor for shard in shards for tensor in read_header(shard)),
        )
        data = manifest.to_bytes()
        _replace(staged / MANIFEST_NAME, data)
        target = self.directory(version)
        if target.exists():
            raise StoreError(f"version {version} exists already in {self._versions}; a version is never overwritten")
        staged.rename(target)
        _fsync(self._versions)
        _replace(self._latest, f"{version}\n".encode())
        return manifest, digest_bytes(data)

    def retain(self, keep: int) -> list[Version]:
        """Delete all but the newest `keep` versions, LATEST and what live leases name; returns what was deleted."""
        versions = self.versions()
        kept = {*versions[-keep:], *self.leased(), self.latest()}
        doomed = [version for version in versions if version not in kept]
        for version in doomed:
            # Out of the namespace in one step, so that a reader sees the version whole or not at all.
            hidden = self._versions / f".staging-retired-{version}"
            self.directory(version).rename(hidden)
            shutil.rmtree(hidden)
        return doomed


def _refused(path: Path, got: str, wanted: str) -> WeightsRefused:
    return WeightsRefused(
        f"{path}: got {got}, expected {wanted}. The old version goes on serving. Publish the step again; if it comes "
        "again, check the weights volume."
    )


def _full(root: Path, version: Version, got: str, wanted: str) -> StoreError:
    return StoreError(
        f"cannot publish version {version} into {root}: got {got}, expected {wanted}. The versions already there are "
        "untouched. Enlarge the weights volume or lower trainer.publish.keep."
    )


def _replace(path: Path, data: bytes) -> None:
    """Write a small file so that readers and crashes see the old content or the new, never a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
