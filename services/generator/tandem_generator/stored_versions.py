"""Find versions in the store, and check their files before the model is changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from tandem_protocol.chains import is_complete
from tandem_protocol.errors import WeightsNotVisible, WeightsRefused
from tandem_protocol.manifest import Manifest
from tandem_protocol.messages import Kind
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

from .materializer import Materializer

_POLL_S = 0.05
"""Pause between two looks for a version, in seconds. A network file system reports no changes."""


class Loadable(NamedTuple):
    """A version with everything that the engine needs to load it."""

    version: Version
    manifest_digest: str | None
    files: tuple[Path, ...]
    kind: Kind = "full"


class StoredVersions:
    """Reads versions for one generator.

    Args:
        store: The store.
        materializer: Makes the files of delta versions.
        visible_timeout_s: How long to wait for a version that another host has written, in seconds.
        is_stopping: Whether the generator stops. It does not wait for a version then.
    """

    def __init__(
        self,
        store: WeightStore,
        materializer: Materializer,
        visible_timeout_s: float,
        is_stopping: Callable[[], bool],
    ) -> None:
        self.root = store.root
        """Directory of the store."""
        self._store = store
        self._materializer = materializer
        self._visible_timeout_s = visible_timeout_s
        self._is_stopping = is_stopping

    async def newest(self, *, but: Collection[Version]) -> Version | None:
        """Return `LATEST`, or the newest version if `LATEST` is among `but`. None if no version is left."""
        return await asyncio.to_thread(self._newest, but)

    def _newest(self, but: Collection[Version]) -> Version | None:
        latest = self._store.latest()
        candidates = [*reversed(self._store.versions()), *([latest] if latest else [])]
        left = [version for version in candidates if version not in but]
        return latest if latest in left else next(iter(left), None)

    async def read(self, version: Version, *, if_latest: bool = False) -> tuple[Manifest, str]:
        """Return the manifest and its digest as soon as they appear on the shared volume.

        Args:
            if_latest: Wait only while `version` is `LATEST`. A newer one may have been published, and this one deleted.

        Raises:
            WeightsNotVisible: The version did not appear in time.
            WeightsRefused: The manifest is damaged.
        """
        deadline = time.monotonic() + self._visible_timeout_s
        while True:
            try:
                return await asyncio.to_thread(self._store.read, version)
            except WeightsNotVisible:
                if self._is_stopping() or time.monotonic() >= deadline:
                    raise
                if if_latest and await asyncio.to_thread(self._store.latest) != version:
                    raise
            await asyncio.sleep(_POLL_S)

    async def manifest(self, version: Version, digest: str) -> Manifest:
        """Return the manifest of `version`, which must have the digest `digest`.

        Raises:
            WeightsNotVisible: The version did not appear in time.
            WeightsRefused: The manifest is damaged, or another run wrote it.
        """
        manifest, found = await self.read(version)
        if found != digest:
            raise WeightsRefused(
                f"version {version} in {self.root} has manifest digest {found}, expected {digest}. Another run "
                "wrote it. Fix: give each run its own shared.weights_dir, and publish again."
            )
        return manifest

    async def verify(self, manifest: Manifest, digest: str, in_use: Collection[Path], *, one_host: bool) -> Loadable:
        """Return a version whose files have been read and compared with their digests.

        The files of a delta version are made on this host first, unless all of them are in the store.

        Args:
            manifest: Manifest of the version.
            digest: Its digest.
            in_use: The files that are served, which must not change.
            one_host: Whether all workers of the engine can read files of this host.

        Raises:
            WeightsRefused: A file is missing or damaged.
        """
        if manifest.delta and one_host:
            files = await asyncio.to_thread(self._materializer.make, manifest, digest, in_use)
            return Loadable(manifest.version, digest, files, manifest.kind)
        if manifest.delta and not await asyncio.to_thread(is_complete, self._store, manifest):
            raise WeightsRefused(
                f"version {manifest.version} is made out of deltas, which a replica on several hosts cannot load. Fix: "
                "set trainer.publish.delta: never."
            )
        await asyncio.to_thread(self._store.verify, manifest)
        directory = self._store.directory(manifest.version)
        files = tuple(directory / file.name for file in manifest.files)
        return Loadable(manifest.version, digest, files, manifest.kind)

    async def clear(self) -> None:
        """Remove the files that a killed generator of the same name has made on this host."""
        await asyncio.to_thread(self._materializer.clear)

    def close(self) -> None:
        """Remove the files that were made on this host."""
        self._materializer.close()
