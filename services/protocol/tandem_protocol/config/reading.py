"""Reads YAML without guessing: every key once, and words without quotes as they are written.

`a: 007` gives `{Key("a"): Plain("007")}`. Which type `007` has is decided later, by the key (see values.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml

from .sections import ConfigError
from .words import NULLS, is_text, kind_in_yaml_1_1, kind_of

_PLAIN, _MERGE, _TEXT = "tandem:plain", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


class Key(str):
    """The name of a key."""

    line: int | None = None
    """Where it stands in its file."""


class Plain(str):
    """A value without quotes, exactly as it is written."""

    line: int | None = None
    """Where it stands in its file. None on the command line and in the environment, where the shell eats quotes."""

    def __repr__(self) -> str:
        return str(self)


WordT = TypeVar("WordT", Key, Plain)


class _Composer(yaml.SafeLoader):
    """Marks values without quotes and tags, in place of choosing their types by YAML 1.1."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _PLAIN
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, gives a key twice, or does not hold one mapping.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Fix: check the path and permissions.") from error
    content = _read(data, str(path), has_lines=True)
    if not isinstance(content, dict):
        got = "nothing" if content is None else "a list" if isinstance(content, list) else f"{content!r}"
        raise ConfigError(f"{path} holds {got}; expected a mapping with the sections shared, generator and trainer")
    return content


def read_value(text: str, where: str) -> Any:
    """A value from the command line or the environment, such as `[0.9, 0.95]` or `"007"`.

    Raises:
        ConfigError: it is not YAML.
    """
    return _read(text, where, has_lines=False)


def _read(data: str | bytes, where: str, *, has_lines: bool) -> Any:
    try:
        node = yaml.compose(data, Loader=_Composer)
        return None if node is None else _Builder(where, has_lines).build(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark and has_lines else ""
        value = "" if has_lines else f" got {data!r};"
        raise ConfigError(f"{where}{place}:{value} this is not YAML: {_problem(error)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error.context)
    if "'\\t'" in problem:
        return "a tab cannot indent. Fix: use spaces"
    if "another document" in problem:
        return "a second document (---) begins here; expected one. Fix: put all sections into one document"
    return problem


class _Builder:
    """Turns one document's nodes into mappings, lists and words."""

    def __init__(self, where: str, has_lines: bool) -> None:
        self._where, self._has_lines = where, has_lines
        self._open: list[yaml.Node] = []
        """The nodes around the present one: an alias of one of them would never end."""

    def build(self, node: yaml.Node) -> Any:
        if node in self._open:
            raise self._error(node, "this alias stands inside of its own anchor; expected one outside of it")
        self._open.append(node)
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node)
            if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
                return [self.build(item) for item in node.value]
            if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
                return self._mapping(node)
            raise self._error(node, f"got the tag {node.tag}; expected a value without a tag")
        finally:
            self._open.pop()

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag == _PLAIN:
            return None if node.value in NULLS else self._at(node, Plain(node.value))
        if node.tag in (_TEXT, _MERGE):
            return str(node.value)
        raise self._error(node, f"got the tag {node.tag} before {node.value!r}; expected a value without a tag")

    def _mapping(self, node: yaml.MappingNode) -> dict[Key, Any]:
        own: dict[Key, Any] = {}
        merged: dict[Key, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            is_merge = key_node.tag == _MERGE
            key = Key("<<") if is_merge else self._key(key_node)
            line = key_node.start_mark.line + 1
            if key in seen:
                again = f" and again on line {line}" if self._has_lines else " and again"
                first = f" on line {seen[key]}" if self._has_lines else ""
                hint = "list both: <<: [*a, *b]" if is_merge else "remove one of them"
                raise ConfigError(f"{self._where}: the key {key!s} stands{first}{again}. Fix: {hint}.")
            seen[key] = line
            if is_merge:
                merged = self._merged(value_node)
            else:
                own[key] = self.build(value_node)
        return merged | own

    def _merged(self, node: yaml.Node) -> dict[Key, Any]:
        """What `<<: *base` or `<<: [*first, *second]` brings: the first one that has a key wins."""
        value = self.build(node)
        maps = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) for item in maps):
            raise self._error(node, "<< got something that is not a mapping; expected an alias of a mapping")
        return {key: item for part in reversed(maps) for key, item in part.items()}

    def _key(self, node: yaml.Node) -> Key:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, "got a key that is a list or a mapping; expected a name")
        word = str(node.value)
        if node.tag == _PLAIN and not is_text(word):
            kind = kind_of(word) or kind_in_yaml_1_1(word)
            problem = f"got the key {word or 'without a name'}, which YAML reads as {kind}; expected a name"
            raise self._error(node, f'{problem}. Fix: quote it: "{word}"')
        return self._at(node, Key(word))

    def _at(self, node: yaml.Node, word: WordT) -> WordT:
        word.line = node.start_mark.line + 1 if self._has_lines else None
        return word

    def _error(self, node: yaml.Node, problem: str) -> ConfigError:
        place = f", line {node.start_mark.line + 1}" if self._has_lines else ""
        return ConfigError(f"{self._where}{place}: {problem}")
