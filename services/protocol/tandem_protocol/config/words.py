"""The meaning of a word without quotes in YAML 1.2, which Tandem follows, and in YAML 1.1, which many tools use."""

from __future__ import annotations

import re

import yaml

NULLS = ("", "~", "null", "Null", "NULL")
"""Words that mean null."""
_BOOLS = {word: value for value in (True, False) for word in (str(value).lower(), str(value), str(value).upper())}
_INT = re.compile(r"[-+]?[0-9]{1,4000}|0o[0-7]+|0x[0-9a-fA-F]+")  # Python's int() accepts at most 4300 digits
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_YAML_1_1 = yaml.resolver.Resolver()
_KINDS_1_2 = {bool: "true or false", int: "a number", float: "a number", type(None): "null"}
_KINDS_1_1 = {"bool": "true or false", "int": "a number", "float": "a number", "timestamp": "a date"}


def value_of(word: str) -> bool | int | float | str | None:
    """Return the value of a word in YAML 1.2's core schema: `1e-5` is a number, `on` and `2026-11-25` are text.

    Source: YAML 1.2.2, section 10.3.
    """
    if word in NULLS:
        return None
    if word in _BOOLS:
        return _BOOLS[word]
    if _INT.fullmatch(word):
        base = {"0o": 8, "0x": 16}.get(word[:2], 10)
        return int(word, base)
    if _FLOAT.fullmatch(word) or _SPECIAL.fullmatch(word):
        return float(word.replace(".", "", 1) if _SPECIAL.fullmatch(word) else word)
    return word


def kind_of(word: str) -> str | None:
    """Return what YAML 1.2 reads `word` as, such as `a number`. None for text."""
    value = value_of(word)
    return _KINDS_1_2.get(type(value))


def kind_in_yaml_1_1(word: str) -> str | None:
    """Return what YAML 1.1 reads `word` as, such as `a date`. None for text."""
    resolved = _YAML_1_1.resolve(yaml.ScalarNode, word, (True, False))  # type: ignore[no-untyped-call]
    tag = str(resolved).rpartition(":")[2]
    return None if tag == "str" else _KINDS_1_1.get(tag, tag)


def is_text(word: str) -> bool:
    """Whether `word` is text in both versions of YAML."""
    return not kind_of(word) and not kind_in_yaml_1_1(word)


def has_leading_zero(word: str) -> bool:
    """Whether `word` is a number such as 010, which is 8 in YAML 1.1 and 10 in YAML 1.2."""
    return _LEADING_ZERO.fullmatch(word) is not None


def means_two_things(word: str) -> bool:
    """Whether YAML 1.1 and 1.2 read `word` differently, such as `on`, `1_000`, `1:30`, `010` or a date."""
    return has_leading_zero(word) or (not kind_of(word) and not is_text(word))
