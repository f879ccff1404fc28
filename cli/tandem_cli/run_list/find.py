"""Find the folders of runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tandem_protocol.config import ConfigError
from tandem_protocol.script import SETTINGS_FILE

from ..watch.runs import is_run
from .options import RUNS_ENV

DEFAULT_FOLDER = "runs"
_NOT_RUNS = {"lost+found"}
_SETTINGS_BYTES = 1 << 20


def default_folder(env: Mapping[str, str] = os.environ) -> Path:
    return Path(env.get(RUNS_ENV) or ".")


def find_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs in a project or in a folder of runs, or `folder` itself if it is a run.

    Raises:
        ConfigError: the folder does not exist, or is none of these.
        OSError: the folder cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"got {folder}, expected the folder of a project or of its runs. Fix: correct the path")
    if is_run(folder):
        return [folder]
    if (inside := _output_folder(folder)) is not None:
        return _subfolders(inside)
    found = _subfolders(folder)
    if not any(map(_looks_like_run, found)) and folder.resolve() != default_folder().resolve():
        raise ConfigError(
            f"got {folder}, which has no runs in it, expected the folder of a project or of its runs. Fix: correct the "
            "path; a run writes its files into PROJECT/runs/NAME"
        )
    return found


def find_run(run: Path) -> Path:
    """Return the folder of a run that is given by its folder or its name.

    Raises:
        ConfigError: no folder of a run has this path or name.
    """
    named: list[Path] = []
    if run.parent == Path():  # a name
        with suppress(ConfigError, OSError):
            named = [found for found in find_folders(default_folder()) if found.name == run.name]
    for folder in (run, *named):
        if _looks_like_run(folder):
            return folder
    raise ConfigError(
        f"got {run}, expected the folder of a run, PROJECT/runs/NAME, or the name of a run in "
        f"{default_folder().absolute()}. Fix: `tandem runs` lists them"
    )


def _output_folder(project: Path) -> Path | None:
    """Return the folder in which a project has its runs; None if `project` is not the folder of a project."""
    files = [file for name in ("config.yaml", SETTINGS_FILE) if (file := project / name).is_file()]
    for file in files:
        if (named := _output_dir(file)) and (project / named).is_dir():
            return project / named
    if (project / DEFAULT_FOLDER).is_dir():
        return project / DEFAULT_FOLDER
    return project / DEFAULT_FOLDER if files else None


def _output_dir(file: Path) -> str | None:
    """Return `trainer.output_dir` of a file of settings, which may be wrong in other places."""
    with suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        with file.open() as opened:
            settings: Any = yaml.safe_load(opened.read(_SETTINGS_BYTES))
        return str(settings["trainer"]["output_dir"])
    return None


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        Path(folder, entry.name)
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and entry.name not in _NOT_RUNS and _is_folder(entry)
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_dir()
    return True  # it is shown as unreadable


def _looks_like_run(folder: Path) -> bool:
    with suppress(OSError):
        return is_run(folder)
    return False
