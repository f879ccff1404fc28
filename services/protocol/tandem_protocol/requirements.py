"""Packages that a project needs besides Tandem's: which of its requirements file are not installed here?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from .config import ConfigError

VARIABLE = "TANDEM_REQUIREMENTS"
"""Environment variable with the name of the file in the project's folder."""
DEFAULT = "requirements.txt"
_INCLUDE = re.compile(r"^(?:-r|--requirement)[\s=]*(?P<file>\S+)")


def requirements_file(project: Path, env: Mapping[str, str] = os.environ) -> Path | None:
    """Return the project's requirements file, or None if it has none.

    Raises:
        ConfigError: the environment names a file that is not there.
    """
    name = env.get(VARIABLE)
    file = project / (name or DEFAULT)
    if file.is_file():
        return file
    if name:
        raise ConfigError(
            f"got {VARIABLE}={name}, expected a file in {project}. Fix: name it relative to that folder, or unset it"
        )
    return None


def missing(file: Path) -> list[str]:
    """Return the requirements that this Python does not meet, each with what is installed instead.

    Requirements that are a path or a URL without a name are left out: only pip knows what they install.

    Raises:
        OSError: a file cannot be read.
    """
    return [problem for line in _lines(file) if (problem := _problem(line))]


def has_hashes(file: Path) -> bool:
    """Whether the file is a lock with hashes. pip then needs `--no-deps`, because the lock has the dependencies."""
    return any("--hash" in line for line in _logical_lines(file))


def _lines(file: Path, including: tuple[Path, ...] = ()) -> Iterator[str]:
    """Yield the lines of a file and of the files that it includes."""
    for line in _logical_lines(file):
        if not (included := _INCLUDE.match(line)):
            yield line
        elif "://" not in included["file"] and (other := file.parent / included["file"]) not in (file, *including):
            yield from _lines(other, (file, *including))


def _logical_lines(file: Path) -> Iterator[str]:
    text = re.sub(r"\\\r?\n", " ", file.read_text(encoding="utf-8-sig", errors="replace"))
    yield from (re.sub(r"(^|\s)#.*$", "", line).strip() for line in text.splitlines())


def _problem(line: str) -> str | None:
    """Return what is wrong with one requirement; None if it is met, or if the line is something else."""
    try:
        required = Requirement(re.split(r"\s--?\w", line)[0])
    except InvalidRequirement:
        return None
    if required.marker and not required.marker.evaluate():
        return None
    try:
        installed = version(required.name)
    except PackageNotFoundError:
        return f"{required} (not installed)"
    if required.specifier.contains(installed, prereleases=True):
        return None
    return f"{required} (installed: {installed})"
