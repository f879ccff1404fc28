"""The project's files on their volume: what the source folder is now, plus what its own prepare.py has made."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STATE = ".tandem-project.json"
"""On the volume: which project it holds, and the files that copies brought, those of an interrupted copy included. Each
has the size and time that its source had, or null."""
LOCK = ".tandem-lock"
"""On the volume: project_lock.py locks it, so it is never deleted."""
NOT_COPIED = ("runs", "weights", "__pycache__", ".*")


def refresh(project: Path, sources: Sequence[Path], identity: str) -> str | None:
    """Copy the files of `sources` to `project`; later sources win.

    Files that an earlier copy brought and that no source has any more are deleted. Everything is deleted first if the
    volume holds another project, or what another prepare.py has made.

    Args:
        identity: a name of the source folder; another folder has another name.

    Returns:
        why everything was deleted first; None if it was not, or if the volume was empty.

    Raises:
        OSError: a file cannot be copied.
    """
    project.mkdir(exist_ok=True)
    now = {"identity": identity, "prepare": _prepare_digest(sources)}
    before = _read(project)
    cleared = _why_clear(project, before, now)
    if before is None or cleared:
        _clear(project)
        before = {"files": {}}
    files = _find(sources)
    known = {*before["files"], *files}
    _write(project, now | {"files": dict.fromkeys(sorted(known))})
    signatures = {name: _signature(file) for name, file in files.items()}
    for name in sorted(known - files.keys()):
        _delete(project, name)
    for source in sources:
        for folder, _ in _walk(source):
            _make_folder(project, folder.relative_to(source).as_posix())
    for name, file in files.items():
        _copy(file, project, name)
    _write(project, now | {"files": signatures})
    return cleared


def is_free_for(project: Path, identity: str) -> bool:
    """Whether the volume is empty, or holds the project of the folder that `identity` names. A new folder at the same
    path, or the same folder after the host has renamed its disk, does not count as another one.
    """
    state = _read(project)
    return state is None or _path(state["identity"]) == _path(identity)


def _path(identity: str) -> str:
    return identity.rpartition("#")[0].rpartition(":")[2]


def changes(project: Path, sources: Sequence[Path]) -> list[str]:
    """Return the names of the files that `sources` has got, changed or lost since they were copied to `project`."""
    state = _read(project)
    before = state["files"] if state else {}
    now = _find(sources)
    return sorted(
        name
        for name in {*before, *now}
        if name not in before
        or name not in now
        or (_signature(now[name]) != before[name] and not _is_same(now[name], project / name))
    )


def identify(source: Path) -> str:
    """A name of the host's folder that is mounted at `source`: file system, path on it, and inode number."""
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    found = [f"{words[words.index('-') + 2]}:{words[3]}" for words in mounts if words[4] == str(source)]
    return f"{found[-1] if found else source}#{source.stat().st_ino}"


def _why_clear(project: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> str | None:
    if before is None:
        return "it is not known which project they belong to" if {*project.iterdir()} - {project / LOCK} else None
    if before["identity"] != now["identity"]:
        return "the volume held another project"
    if before["prepare"] != now["prepare"]:
        return "prepare.py has changed"
    return None


def _prepare_digest(sources: Sequence[Path]) -> str | None:
    """Digest of the prepare.py that will run, if there is one."""
    found = [source / "prepare.py" for source in sources if (source / "prepare.py").is_file()]
    return hashlib.sha256(found[-1].read_bytes()).hexdigest() if found else None


def _read(project: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((project / STATE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    is_state = isinstance(state, dict) and state.keys() >= {"identity", "prepare", "files"}
    return state if is_state and isinstance(state["files"], dict) else None


def _write(project: Path, state: dict[str, Any]) -> None:
    """Replace the state in one step, so that a reader never sees half of it."""
    temporary = project / f"{STATE}.new"
    temporary.write_text(json.dumps(state))
    temporary.replace(project / STATE)


def _signature(file: Path) -> list[int]:
    """Size and time of the last change: a file that keeps both has not changed."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _is_same(file: Path, copy: Path) -> bool:
    return copy.is_file() and filecmp.cmp(file, copy, shallow=False)


def _find(sources: Sequence[Path]) -> dict[str, Path]:
    """The files to copy: their names, relative to the project, and where they are."""
    found: dict[str, Path] = {}
    for source in sources:
        for folder, names in _walk(source):
            found |= {(folder / name).relative_to(source).as_posix(): folder / name for name in names}
    return found


def _walk(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder of `source`, and the names of the files in it that are copied."""
    ignored = shutil.ignore_patterns(*NOT_COPIED)
    visited = set()  # a link may lead back to a folder above it
    for folder, folders, names in os.walk(source, followlinks=True):
        if (place := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(place)
        skipped = ignored(folder, [*folders, *names])
        folders[:] = [name for name in folders if name not in skipped]
        yield Path(folder), [name for name in names if name not in skipped]


def _make_folder(project: Path, name: str) -> None:
    """Make a folder of the project, in the place of whatever prepare.py has made there instead."""
    folder = project / name
    for parent in [*reversed(folder.relative_to(project).parents), folder.relative_to(project)]:
        path = project / parent
        if path != project and (path.is_symlink() or path.is_file()):
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _copy(source: Path, project: Path, name: str) -> None:
    target = project / name
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)  # prepare.py made a folder where the source has a file now
    _make_folder(project, Path(name).parent.as_posix())
    target.unlink(missing_ok=True)  # it may be a link that prepare.py made, to somewhere else
    shutil.copyfile(source, target)
    os.utime(target, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))  # a script's copy keeps newer files
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def _clear(project: Path) -> None:
    """Delete everything in `project`, but not the folder itself: it is a mount point."""
    for path in project.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _delete(project: Path, name: str) -> None:
    """Delete a file, and the folders above it that are empty then."""
    path = project / name
    if path.is_file() or path.is_symlink():
        path.unlink()
    for folder in path.parents:
        if folder == project or not folder.is_dir() or any(os.scandir(folder)):
            break
        folder.rmdir()
