"""Which versions a version is made out of, and from which files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from .errors import WeightsNotVisible, WeightsRefused
from .manifest import DELTA_SUFFIX, DeltaFile, FileEntry, Manifest
from .version import Version

Local = Callable[[Version, str, str], Path | None]
"""Version, digest of its manifest, file name → the complete file that the reader has made before, if it has it."""


class Reader(Protocol):
    """The part of `WeightStore` that is used here."""

    def directory(self, version: Version) -> Path: ...
    def read(self, version: Version) -> tuple[Manifest, str]: ...


class Source(NamedTuple):
    """How one complete file of a version is made."""

    file: FileEntry
    """What comes out."""
    base: Path
    """The complete file to begin with. Without deltas, it is the file itself."""
    deltas: tuple[tuple[Path, DeltaFile], ...]
    """The deltas to apply to it, in this order."""


def is_complete(store: Reader, manifest: Manifest) -> bool:
    """Whether all files of a version are in its directory, with their sizes."""
    return all(_is_there(store, manifest, file) for file in manifest.files)


def closure(store: Reader, versions: Iterable[Version]) -> set[Version]:
    """Return the versions, and all versions that a reader who has none of them needs to make them."""
    needed: set[Version] = set()
    for version in versions:
        one: Version | None = version
        while one is not None and one not in needed:
            needed.add(one)
            one = _parent(store, one)
    return needed


def _parent(store: Reader, version: Version) -> Version | None:
    """Return the version that this one is made out of. None: it needs no other one, or it is damaged."""
    if not any(store.directory(version).glob(f"*{DELTA_SUFFIX}")):
        return None  # without reading a manifest, which takes 0.1 s if the model has 10,000 tensors
    try:
        manifest, _ = store.read(version)
    except (WeightsNotVisible, WeightsRefused):
        return None
    return manifest.delta.parent if manifest.delta and not is_complete(store, manifest) else None


def sources(store: Reader, manifest: Manifest, local: Local = lambda *_: None) -> list[Source]:
    """Return how each file of a version is made.

    Args:
        store: The store.
        manifest: Manifest of the version.
        local: Finds files of other versions that the reader has.

    Raises:
        WeightsRefused: A file that is needed is not there.
    """
    line = _Line(store, manifest)
    return [_source(store, line, file, local) for file in manifest.files]


class _Line:
    """A version, its parent, and so on. Each manifest is read once, when it is needed."""

    def __init__(self, store: Reader, manifest: Manifest) -> None:
        self._store = store
        self._manifests = [manifest]

    def __getitem__(self, generation: int) -> Manifest:
        while len(self._manifests) <= generation:
            child = self._manifests[-1]
            if child.delta is None:
                raise _lacks(self._manifests[0].version, f"the files of version {child.version}")
            try:
                parent, digest = self._store.read(child.delta.parent)
            except (WeightsNotVisible, WeightsRefused) as error:
                raise _lacks(self._manifests[0].version, f"version {child.delta.parent}") from error
            if digest != child.delta.parent_digest:
                raise _lacks(self._manifests[0].version, f"version {child.delta.parent} of this run")
            self._manifests.append(parent)
        return self._manifests[generation]


def _source(store: Reader, line: _Line, file: FileEntry, local: Local) -> Source:
    deltas: list[tuple[Path, DeltaFile]] = []
    generation = 0
    while True:
        manifest = line[generation]
        entry = next((one for one in manifest.files if one.name == file.name), None)
        if entry is None:
            raise _lacks(line[0].version, f"{file.name} of version {manifest.version}")
        delta = manifest.deltas.get(file.name)
        parent = manifest.delta if delta else None
        made = local(parent.parent, parent.parent_digest, file.name) if parent else None
        if made is None and _is_there(store, manifest, entry):
            return Source(file, store.directory(manifest.version) / file.name, tuple(reversed(deltas)))
        if delta is None:
            raise _lacks(line[0].version, f"{file.name} of version {manifest.version}")
        deltas.append((store.directory(manifest.version) / delta.name, delta))
        if made is not None:
            return Source(file, made, tuple(reversed(deltas)))
        generation += 1


def _is_there(store: Reader, manifest: Manifest, file: FileEntry) -> bool:
    directory = store.directory(manifest.version)
    try:
        # List the directory: a network file system may cache that a file does not exist, and it may come later.
        names = {path.name for path in directory.iterdir()}
        return file.name in names and (directory / file.name).stat().st_size == file.size_bytes
    except OSError:
        return False


def _lacks(version: Version, what: str) -> WeightsRefused:
    return WeightsRefused(
        f"version {version} is made out of deltas, and {what} is missing, which they need. The old version is still "
        "served. Fix: publish the step again in full."
    )
