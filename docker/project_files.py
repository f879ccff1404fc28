"""The project's files on their volume: what the source folder is now, plus what its own prepare.py has made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

STATE = ".tandem-project.json"
"""On the volume. Absent while files are copied, so that an interrupted copy begins from nothing."""
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
    (project / STATE).unlink(missing_ok=True)
    if before is None or cleared:
        _clear(project)
    files = _find(sources)
    for name in sorted(set(before["files"] if before and not cleared else ()) - files.keys()):
        _delete(project, name)
    for name, source in files.items():
        _copy(source, project / name)
    (project / STATE).write_text(json.dumps(now | {"files": sorted(files)}))
    return cleared


def identify(source: Path) -> str:
    """A name of the host's folder that is mounted at `source`: its path on its file system, and its inode number."""
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    roots = [words[3] for words in mounts if words[4] == str(source)]
    return f"{roots[-1] if roots else source}#{source.stat().st_ino}"


def _why_clear(project: Path, before: dict[str, object] | None, now: dict[str, object]) -> str | None:
    if before is None:
        return "an earlier copy was interrupted" if any(project.iterdir()) else None
    if before["identity"] != now["identity"]:
        return "the volume held another project"
    if before["prepare"] != now["prepare"]:
        return "prepare.py has changed"
    return None


def _prepare_digest(sources: Sequence[Path]) -> str | None:
    """Digest of the prepare.py that will run, if there is one."""
    found = [source / "prepare.py" for source in sources if (source / "prepare.py").is_file()]
    return hashlib.sha256(found[-1].read_bytes()).hexdigest() if found else None


def _read(project: Path) -> dict[str, object] | None:
    try:
        state = json.loads((project / STATE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return state if isinstance(state, dict) and state.keys() >= {"identity", "prepare", "files"} else None


def _find(sources: Sequence[Path]) -> dict[str, Path]:
    """The files to copy: their names, relative to the project, and where they are."""
    ignored = shutil.ignore_patterns(*NOT_COPIED)
    found: dict[str, Path] = {}
    for source in sources:
        for folder, folders, names in os.walk(source, followlinks=True):
            skipped = ignored(folder, [*folders, *names])
            folders[:] = [name for name in folders if name not in skipped]
            paths = [Path(folder, name) for name in names if name not in skipped]
            found |= {path.relative_to(source).as_posix(): path for path in paths}
    return found


def _copy(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)  # prepare.py made a folder where the source has a file now
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _clear(project: Path) -> None:
    """Delete everything in `project`, but not the folder itself: it is a mount point."""
    for path in project.iterdir():
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
