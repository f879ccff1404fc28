"""Every value of a loaded configuration with where it came from, for `--check` and for the run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from .schema import dotted
from .sections import Section


class Resolved(Section):
    """A value and where it came from."""

    key: str
    value: Any
    source: str


def resolved(settings: BaseModel, sources: Mapping[str, str]) -> list[Resolved]:
    """Every value with where it came from."""
    return [
        Resolved(key=key, value=value, source=sources.get(key, "default"))
        for key, value in _flatten(settings.model_dump(mode="json"), ())
    ]


def format_resolved(settings: BaseModel, sources: Mapping[str, str]) -> str:
    """The same, one `key: value  # source` a line."""
    rows = resolved(settings, sources)
    width = max(len(row.key) for row in rows)
    return "\n".join(f"{row.key:<{width}}  {row.value!r}  # {row.source}" for row in rows)


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, (*path, name))
        else:
            yield dotted((*path, name)), value
