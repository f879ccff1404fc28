"""Find the keys of a configuration model, and suggest a key for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter

from .sections import SECTIONS, ConfigError
from .values import alternatives, mapping_of, model_of, takes_text

KeyPath = tuple[str, ...]
"""Parts of a dotted key."""


class Place(NamedTuple):
    """A key and the type of its value."""

    path: KeyPath
    """The key."""
    annotation: Any
    """Type of its value."""


class Schema:
    """The keys of a settings model, which has one field per section."""

    def __init__(self, settings: type[BaseModel]) -> None:
        self._settings = settings
        self.root = Place((), settings)

    def locate(
        self, start: Place, words: Sequence[str], *, separator: str, source: str, lower: bool = False
    ) -> Place | None:
        """Find the key `words` below `start`.

        Args:
            start: Where to start.
            words: Names of the fields and keys on the path.
            separator: Separator between the words. In a mapping from names to text it is part of the name:
                `generator.env.A.B` is the variable `A.B`.
            source: Source of the key, for messages.
            lower: Convert names of fields to lower case. Keys of mappings that accept any key are kept.

        Returns:
            The key. None for a key that is checked elsewhere: one of another service, or an ignored one.

        Raises:
            ConfigError: The key does not exist.
        """
        path, annotation = start
        for index, word in enumerate(words):
            if model := model_of(annotation):
                name = word.lower() if lower else word
                if name not in model.model_fields:
                    if model.model_config.get("extra") == "ignore" or (not path and name in SECTIONS):
                        return None
                    raise self._unknown((*path, name, *words[index + 1 :]), source)
                path = (*path, name)
                annotation = model.model_fields[name].annotation
            elif mapping := mapping_of(annotation):
                key_type, annotation = mapping
                if takes_text(annotation):
                    return Place((*path, _name(key_type, separator.join(words[index:]))), annotation)
                path = (*path, _name(key_type, word))
            elif annotation is Any:
                path = (*path, word)
            else:
                raise self._unknown((*path, *words[index:]), source)
        return Place(path, annotation)

    def _unknown(self, path: KeyPath, source: str) -> ConfigError:
        key, section, leaf = dotted(path), dotted(path[:-1]), path[-1]
        known = set(_keys(self._settings))
        siblings = sorted(k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section)
        elsewhere = sorted(k for k in known if k.rpartition(".")[2] == leaf)
        near = [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(leaf, siblings, n=1)]
        if elsewhere or not siblings:  # the key is in another section, or this section does not exist
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.75) or elsewhere
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif siblings and section:
            hint = f"the keys of {section} are {', '.join(siblings)}"
        else:
            hint = f"the sections are {', '.join(SECTIONS)}"
        return ConfigError(f"unknown configuration key {key!r} (from {source}); {hint}")


def dotted(path: KeyPath) -> str:
    """Join a path with dots: `trainer.max_steps`. A name that contains a dot is quoted: `generator.env."A.B"`."""
    return ".".join(f'"{name}"' if "." in name else name for name in path)


def takes_keys(annotation: Any) -> bool:
    """Whether values of this type may have keys, which later sources can override one by one."""
    return annotation is Any or bool(model_of(annotation) or mapping_of(annotation))


def _name(key_type: Any, name: str) -> str:
    """Normalize a name as its mapping does: `max-num-seqs` and `max_num_seqs` are one key of `generator.vllm`."""
    return str(_adapter(key_type).validate_python(str(name)))


_adapter = cache(TypeAdapter)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of `model`, including those of sections."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for candidate in alternatives(field.annotation):
            if inner := model_of(candidate):
                yield from _keys(inner, f"{key}.")
