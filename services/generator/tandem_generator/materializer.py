"""Make the complete files of a delta version in memory or on a disk of this machine."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Collection
from pathlib import Path

from tandem_protocol.chains import Source, sources
from tandem_protocol.errors import WeightsRefused
from tandem_protocol.manifest import DeltaFile, Manifest, TensorEntry, digest_bytes, read_header
from tandem_protocol.memory import available_bytes, is_in_memory
from tandem_protocol.store import WeightStore
from tandem_protocol.verification import check_table, verified
from tandem_protocol.version import Version

log = logging.getLogger(__name__)

_PARTIAL = ".partial"


class Materializer:
    """Makes versions for one generator, and keeps the last ones, because the next version is made out of them.

    A version gets its name when the digests of its complete files are right. So nothing else is ever loaded.

    Args:
        store: The store.
        directory: Where to make files. None: the system's directory for temporary files.
        generator_id: Name of the generator. Its files are in a directory of its own, which it locks.
    """

    def __init__(self, store: WeightStore, directory: Path | None, generator_id: str) -> None:
        self._store = store
        self._folder = (directory or Path(tempfile.gettempdir())) / f"tandem-{generator_id}"
        self._unlock: weakref.finalize[[int], Materializer] | None = None
        self._lock = threading.Lock()  # a switch that was given up may still be at work

    def make(self, manifest: Manifest, digest: str, in_use: Collection[Path]) -> tuple[Path, ...]:
        """Return the complete files of a version, whose digests are right.

        Args:
            manifest: Manifest of the version.
            digest: Its digest.
            in_use: Files that must not change, because they are served and may be loaded again.

        Raises:
            WeightsRefused: A required file is missing or damaged, or the folder has too little space.
        """
        try:
            with self._lock:
                self._open()
                plan = sources(self._store, manifest, self._local)
                try:
                    return self._made(manifest, digest, plan, in_use)
                except (OSError, ValueError, WeightsRefused):
                    from_store = sources(self._store, manifest)
                    if plan == from_store:
                        raise
                    return self._made(manifest, digest, from_store, in_use)  # the file made before may be damaged
        except (ImportError, OSError, ValueError) as error:
            raise WeightsRefused(
                f"the files of version {manifest.version} could not be made out of its deltas in {self._folder}: "
                f"{error}. The old version is still served. Fix: publish the step in full; if the folder is full, "
                "set generator.materialize_dir to a folder with space for two versions; if another process uses the "
                "folder, give each generator its own generator.generator_id."
            ) from error

    def clear(self) -> None:
        """Remove what a killed process of the same name has left. It may take as much memory as two versions.

        Without this, it would stay until the next delta version, which may never come.
        """
        try:
            with self._lock:
                if self._folder.exists():
                    self._open()
        except OSError as error:
            log.warning(
                "%s cannot be removed: %s. If no other process uses it, remove it, because it may take the space of "
                "two versions.",
                self._folder,
                error,
            )

    def close(self) -> None:
        """Remove all files."""
        if self._unlock:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._unlock()

    def _open(self) -> None:
        """Create and lock the directory. What a process with the same name left there is removed.

        Two processes that wrote the same files would not notice it: a digest is that of the bytes that were written.

        Raises:
            OSError: Another process uses the directory, another user owns it, or it is a link.
        """
        if self._unlock:
            return
        self._folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        unlock = weakref.finalize(self, os.close, descriptor)
        try:
            _lock_folder(descriptor)
            for path in self._folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError:
            unlock()
            raise
        self._unlock = unlock

    def _directory(self, version: Version, digest: str) -> Path:
        return self._folder / f"{self._store.directory(version).name}-{digest}"

    def _local(self, version: Version, digest: str, name: str) -> Path | None:
        path = self._directory(version, digest) / name
        return path if path.exists() else None

    def _made(self, manifest: Manifest, digest: str, plan: list[Source], in_use: Collection[Path]) -> tuple[Path, ...]:
        target = self._directory(manifest.version, digest)
        self._require_space(plan)
        bases = {source.base for source in plan}
        partial = self._space({*in_use, *bases}, {source.file.name for source in plan if source.deltas})
        found = verified([(source.base, source.file) for source in plan if not source.deltas])
        for source in plan:
            if source.deltas:
                found += _apply(source, partial / source.file.name)
        check_table(partial, found, manifest)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        return tuple(target / source.file.name if source.deltas else source.base for source in plan)

    def _require_space(self, plan: list[Source]) -> None:
        """Check that the folder has space for this version and the next one. A folder in memory is never filled up.

        Raises:
            OSError: It has less.
        """
        needed = 2 * sum(source.file.size_bytes for source in plan if source.deltas)
        used = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        room = shutil.disk_usage(self._folder).free
        if is_in_memory(self._folder) and (available := available_bytes()) is not None:
            room = min(room, available)  # such a file system may be larger than the memory
        if (room := room + used) < needed:
            raise OSError(f"got space for {room / 1e6:.0f} MB, expected {needed / 1e6:.0f} MB")

    def _space(self, kept: Collection[Path], names: Collection[str]) -> Path:
        """Return a directory for new files. It has old files to overwrite, because their memory is already there."""
        partial = self._folder / _PARTIAL
        keep = {path.parent for path in kept}
        spares = [path for path in sorted(self._folder.iterdir()) if path not in keep]
        if partial not in spares and spares:
            spares.pop().rename(partial)
        for spare in spares:
            if spare != partial:
                shutil.rmtree(spare)
        partial.mkdir(exist_ok=True)
        for path in partial.iterdir():
            if path.name not in names or _is_open(path):
                path.unlink()
        return partial


def _apply(source: Source, target: Path) -> tuple[TensorEntry, ...]:
    """Make one file, and return its table of tensors.

    Raises:
        ValueError: What came out is not the file of the manifest.
    """
    from tandem_protocol.delta import apply, decode  # needs numpy, which the mock's image does not have

    digest = apply(source.base, [decode(_read(path, delta)) for path, delta in source.deltas], target)
    if digest != source.file.xxh3_128:
        raise ValueError(
            f"{source.file.name} has xxh3-128 {digest} after {len(source.deltas)} deltas, expected "
            f"{source.file.xxh3_128}"
        )
    return read_header(target)


def _read(path: Path, delta: DeltaFile) -> bytes:
    data = path.read_bytes()
    if digest_bytes(data) != delta.xxh3_128:
        raise ValueError(f"{path} has xxh3-128 {digest_bytes(data)}, expected {delta.xxh3_128}")
    return data


def _lock_folder(descriptor: int) -> None:
    if os.fstat(descriptor).st_uid != os.geteuid():
        raise PermissionError("another user owns the folder")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError("another process uses the folder") from None
    os.fchmod(descriptor, 0o700)


def _is_open(path: Path) -> bool:
    """Whether any process has the file open or mapped, for example an engine whose load has timed out.

    The kernel gives a lease for writing only if nobody else has the file. A file system without leases says no.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
