"""List every value of a loaded configuration with its source, for `--check` and for the run's folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ..secrets import HIDDEN, is_secret, mask_forms
from .schema import dotted
from .sections import Section

_ROW = re.compile(r"(\S+) +(.*)  # .*")
"""A line of `format_resolved`."""


class Resolved(Section):
    """A value of the configuration and its source."""

    key: str
    """Dotted key."""
    value: Any
    """The value, as JSON types."""
    source: str
    """Where the value came from: `default`, a file with its path, `environment` or `command line`."""


def resolved(settings: BaseModel, sources: Mapping[str, str]) -> list[Resolved]:
    """Return every value of the configuration with its source. Secrets are masked.

    Args:
        settings: The loaded settings.
        sources: Dotted key → source, from `load`.
    """
    return [
        Resolved(key=key, value=_shown(key, value), source=sources.get(key, "default"))
        for key, value in _flatten(settings.model_dump(mode="json"), ())
    ]


def _shown(key: str, value: Any) -> Any:
    """Mask the secrets in a value: in every text, and completely if the key says that it is one."""
    if isinstance(value, list):
        return [_shown(key, item) for item in value]
    if isinstance(value, Mapping):
        return {name: _shown(f"{key}.{name}", item) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    return HIDDEN if is_secret(key.rpartition(".")[2]) else mask_forms(value)


def format_resolved(settings: BaseModel, sources: Mapping[str, str]) -> str:
    """Return every value with its source as text, one `key  value  # source` per line. Secrets are masked.

    Args:
        settings: The loaded settings.
        sources: Dotted key → source, from `load`.
    """
    rows = resolved(settings, sources)
    width = max(len(row.key) for row in rows)
    return "\n".join(f"{row.key:<{width}}  {row.value!r}  # {row.source}" for row in rows)


def read_resolved(text: str) -> dict[str, str]:
    """Return the values in a text of `format_resolved`, as it shows them. Other lines are left out."""
    return {found[1]: found[2] for line in text.splitlines() if (found := _ROW.fullmatch(line))}


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, (*path, name))
        else:
            yield dotted((*path, name)), value
