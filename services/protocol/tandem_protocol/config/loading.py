"""Merge the sources of the configuration key by key, and validate the result."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from ..problems import describe, shorten
from ..secrets import HIDDEN, is_secret
from .reading import Key, read_file
from .schema import KeyPath, Place, Schema, dotted, takes_keys
from .sections import ConfigError
from .values import is_section, model_of, read_words, typed

ENV_PREFIX = "TANDEM__"
"""Prefix of environment variables that set configuration keys."""

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class Leaf(NamedTuple):
    """The value of one key from one source."""

    place: Place
    """The key and its type."""
    value: Any
    """The value."""
    source: str
    """Name of the source, as `--check` prints it."""
    where: str
    """The source with its line or variable, for messages."""

    @property
    def is_empty(self) -> bool:
        """Whether this is a mapping without keys. It does not reset the keys that other sources set."""
        return self.value == {} or (self.value is None and is_section(self.place.annotation))


def load(
    settings: type[SettingsT],
    *,
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[SettingsT, dict[str, str]]:
    """Load the configuration from all sources.

    Args:
        settings: Model with one field per section, such as `shared` and `generator`. Other sections are ignored.
            Unknown keys in its own sections are refused, except in models with `extra="ignore"`.
        path: The YAML file. None: no file. Its folder is the project; relative paths start there, because the services
            change into it.
        env: Environment variables. None: those of this process.
        overrides: Dotted key → value from the command line. Text is parsed like a command-line argument.
        defaults: Dotted key → value, in the same form. Every other source overrides them.

    Returns:
        The settings, and dotted key → source for every value that is not the model's default.

    Raises:
        ConfigError: A key does not exist, or a value is invalid. The message suggests the key that was probably meant.
    """
    keys = Schema(settings)
    leaves = list(_from_options(keys, defaults or {}, "default of the caller"))
    leaves += _each_once(_from_file(keys, path)) if path else ()
    leaves += _each_once(_spelled_as(leaves, _from_env(keys, os.environ if env is None else env)))
    leaves = _merge([*leaves, *_from_options(keys, overrides or {}, "command line")])
    values = _tree(settings, leaves)
    try:
        loaded = settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, leaves, path) for problem in error.errors())) from error
    return loaded, {dotted(leaf.place.path): leaf.source for leaf in leaves}


def _from_file(keys: Schema, path: Path) -> Iterator[Leaf]:
    yield from _leaves(keys, read_file(path), keys.root, str(path), str(path))


def _leaves(keys: Schema, tree: Mapping[str, Any], start: Place, source: str, where: str) -> Iterator[Leaf]:
    """Yield the leaves of a mapping. Field names contain no dots, so `trainer.max_steps: 5` is a nested key."""
    for key, value in tree.items():
        line = f"{source}, line {key.line}" if isinstance(key, Key) and key.line else where
        words = key.split(".") if model_of(start.annotation) else [key]
        if place := keys.locate(start, words, separator=".", source=line):
            yield from _leaf(keys, place, value, source, line)


def _leaf(keys: Schema, place: Place, value: Any, source: str, where: str) -> Iterator[Leaf]:
    if isinstance(value, Mapping) and value and takes_keys(place.annotation):
        yield from _leaves(keys, value, place, source, where)
    else:
        yield Leaf(place, value, source, where)


def _from_env(keys: Schema, env: Mapping[str, str]) -> Iterator[Leaf]:
    """Yield the values from the environment. `TANDEM__A__B=1` sets `a.b` to 1."""
    for variable, text in env.items():
        if variable.startswith(ENV_PREFIX):
            words = variable.removeprefix(ENV_PREFIX).split("__")
            if place := keys.locate(keys.root, words, separator="__", source=variable, lower=True):
                value = read_words(text, place.annotation, variable)
                yield from _leaf(keys, place, value, "environment", variable)


def _spelled_as(known: Iterable[Leaf], leaves: Iterable[Leaf]) -> Iterator[Leaf]:
    """Use the spelling in the file for keys from the environment, where names are usually written in capitals.

    `…__ENABLE_THINKING` sets the key `enable_thinking` if the file has it.
    """
    paths = {leaf.place.path[:length] for leaf in known for length in range(1, len(leaf.place.path) + 1)}
    spellings = {tuple(name.lower() for name in path): path for path in paths}
    for leaf in leaves:
        path, annotation = leaf.place
        lower = tuple(name.lower() for name in path)
        same = max((n for n in range(len(path) + 1) if lower[:n] in spellings), default=0)
        yield leaf._replace(place=Place((*spellings.get(lower[:same], ()), *path[same:]), annotation))


def _from_options(keys: Schema, options: Mapping[str, Any], source: str) -> Iterator[Leaf]:
    for key, value in options.items():
        if place := keys.locate(keys.root, key.split("."), separator=".", source=source):
            read = read_words(value, place.annotation, f"--{key}") if isinstance(value, str) else value
            yield from _leaf(keys, place, read, source, source)


def _each_once(leaves: Iterable[Leaf]) -> Iterator[Leaf]:
    """Pass the leaves on. Raise ConfigError if a source sets the same key twice, in two spellings."""
    seen: dict[KeyPath, str] = {}
    for leaf in leaves:
        path = leaf.place.path
        if path in seen:
            raise ConfigError(f"{dotted(path)} is given twice: {seen[path]}, and {leaf.where}. Fix: remove one.")
        seen[path] = leaf.where
        yield leaf


def _merge(leaves: Iterable[Leaf]) -> list[Leaf]:
    """Keep the last leaf of each key. A value replaces all keys below it and any value above it."""
    merged: dict[KeyPath, Leaf] = {}
    for leaf in leaves:
        path = leaf.place.path
        below = [other for other in merged if other[: len(path)] == path]
        if leaf.is_empty and below:
            continue
        above = [path[:length] for length in range(len(path)) if path[:length] in merged]
        merged = {other: kept for other, kept in merged.items() if other not in (*below, *above)} | {path: leaf}
    return list(merged.values())


def _tree(settings: type[BaseModel], leaves: Iterable[Leaf]) -> dict[str, Any]:
    """Build the nested mapping that pydantic validates.

    Raises:
        ConfigError: Values are ambiguous. The message names all of them.
    """
    values: dict[str, Any] = {section: {} for section in settings.model_fields}
    problems = []
    for (path, annotation), value, _, where in leaves:
        tree = values
        for name in path[:-1]:
            tree = tree.setdefault(name, {})
        try:
            tree[path[-1]] = typed(value, annotation)
        except ValueError as error:
            text = str(error).replace(str(value), HIDDEN) if is_secret(path[-1]) else error
            problems.append(f"{dotted(path)} (from {where}): {text}")
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def _explain(problem: Any, leaves: Iterable[Leaf], path: Path | None) -> str:
    parts = tuple(str(part) for part in problem["loc"])
    key = ".".join(parts)
    # Items of a list have no source. Use the list's.
    named = (leaf.where for leaf in leaves if parts[: len(leaf.place.path)] == leaf.place.path)
    where = next(named, path or "defaults")
    if problem["type"] == "missing":
        variable = "" if any(part.isdecimal() for part in parts) else f" or as {ENV_PREFIX}{'__'.join(parts).upper()}"
        return f"{key} is missing. Fix: set it in {path or 'the YAML file'}{variable}."
    if problem["type"] == "value_error":  # one of our own validators: its message already contains the value
        return f"{key} (from {where}): {problem['ctx']['error']}"
    got = HIDDEN if any(map(is_secret, parts)) else shorten(problem["input"])
    return f"{key}: got {got} (from {where}); {describe(problem)}"
