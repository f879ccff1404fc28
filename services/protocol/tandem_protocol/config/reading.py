"""Read YAML without guessing types. Duplicate keys are refused.

`a: 007` gives `{Key("a"): Plain("007")}`. The type of the key decides later what `007` means (see values.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml

from .sections import ConfigError
from .words import NULLS, is_text, kind_in_yaml_1_1, kind_of

_PLAIN = "tandem:plain"
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"


class Key(str):
    """The name of a key."""

    line: int | None = None
    """Line in its file."""


class Plain(str):
    """A value without quotes, as it is written."""

    line: int | None = None
    """Line in its file. None on the command line and in the environment, where the shell removes quotes."""

    def __repr__(self) -> str:
        return str(self)


WordT = TypeVar("WordT", Key, Plain)


class _Composer(yaml.SafeLoader):
    """Marks values without quotes and tags as plain, instead of choosing their types by the rules of YAML 1.1."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _PLAIN
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file that contains one mapping.

    Raises:
        ConfigError: The file cannot be read, is not YAML, has a duplicate key, or does not contain one mapping.
    """
    content = read_document(path)
    if not isinstance(content, dict):
        got = repr(content)
        if content is None:
            got = "nothing"
        elif isinstance(content, list):
            got = "a list"
        raise ConfigError(f"{path} contains {got}; expected a mapping with the sections shared, generator and trainer")
    return content


def read_document(path: Path) -> Any:
    """Read a YAML file that contains one document of any kind.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or has a duplicate key.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Fix: check the path and permissions.") from error
    return _read(data, str(path), has_lines=True)


def read_value(text: str, where: str) -> Any:
    """Read a value from the command line or the environment, such as `[0.9, 0.95]` or `"007"`.

    Args:
        text: The value as YAML.
        where: Its option or variable, for messages.

    Raises:
        ConfigError: `text` is not YAML.
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
        return "a tab is not allowed as indentation. Fix: use spaces"
    if "another document" in problem:
        return "a second document (---) starts here; expected one. Fix: put all sections into one document"
    return problem


class _Builder:
    """Converts the nodes of a document into mappings, lists and words."""

    def __init__(self, where: str, has_lines: bool) -> None:
        self._where = where
        self._has_lines = has_lines
        self._open: list[yaml.Node] = []
        """The nodes that contain the current one. An alias of one of them would be an endless loop."""

    def build(self, node: yaml.Node) -> Any:
        """Convert one node and everything below it."""
        if node in self._open:
            raise self._error(node, "this alias is inside its own anchor; expected an alias outside of it")
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
                raise ConfigError(f"{self._where}: got the key {key!s}{first}{again}, expected it once. Fix: {hint}.")
            seen[key] = line
            if is_merge:
                merged = self._merged(value_node)
            else:
                own[key] = self.build(value_node)
        return merged | own

    def _merged(self, node: yaml.Node) -> dict[Key, Any]:
        """Return the keys of `<<: *base` or `<<: [*first, *second]`. For a duplicate key, the first mapping wins."""
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
