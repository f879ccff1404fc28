"""Finds the checkout of Tandem: the folder with the compose files of the stack."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from tandem_protocol.config import ConfigError

COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml", "compose.devices.yaml")
"""Compose files in the order of merging. `tandem gpus` writes the last one."""
_SERVICES = {"preflight", "generator", "trainer"}


def find_checkout(named: Path | None) -> Path:
    """Return the folder that `named` names, or else the current folder or its nearest parent that is a checkout.

    Compose looks for its files in the same way.

    Raises:
        ConfigError: it is not a checkout.
    """
    if named is not None:
        if missing := _missing(named):
            raise ConfigError(
                f"{named} {missing}, expected a checkout of Tandem. Fix: --directory DIR names its folder"
            )
        return named
    here = Path.cwd()
    for folder in (here, *here.parents):
        if not _missing(folder):
            return folder
    raise ConfigError(
        f"{here} {_missing(here)}, and neither has a folder above it, expected a checkout of Tandem. Fix: run this in "
        f"its folder, or name it with --directory {installed_from() or 'DIR'}"
    )


def installed_from() -> Path | None:
    """Return the checkout that `make setup` installed this command from; None if it was installed otherwise."""
    folder = Path(__file__).parents[2]
    return None if _missing(folder) else folder


def _missing(folder: Path) -> str:
    """Return what keeps a folder from being a checkout, or an empty string."""
    if missing := [name for name in COMPOSE_FILES[:2] if not (folder / name).is_file()]:
        return f"has no {' and no '.join(missing)}"
    return "" if _SERVICES.issubset(_services(folder / COMPOSE_FILES[0])) else "has the compose.yaml of another stack"


def _services(file: Path) -> Iterable[str]:
    try:
        values = yaml.safe_load(file.read_text())
        return values["services"].keys() if isinstance(values, dict) else ()
    except (OSError, ValueError, yaml.YAMLError, KeyError, AttributeError):
        return ()  # compose cannot read it either
