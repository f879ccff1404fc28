"""Convert each value to the type of its key. Words without quotes that the type does not make clear are refused."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from .reading import Plain, read_value
from .words import NULLS, has_leading_zero, is_text, kind_in_yaml_1_1, kind_of, means_two_things, value_of

LARGEST = 2**63
"""Integers must be smaller than this. torch, NumPy and vLLM use 64 bits."""


def alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types in a union: `Annotated[int, …] | None` gives int and NoneType."""
    if get_origin(annotation) is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from alternatives(argument)
    else:
        yield annotation


def model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the configuration model in the union. None if it has none."""
    return next((a for a in alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)


def mapping_of(annotation: Any) -> tuple[Any, Any] | None:
    """Return the key and value types of the `dict` in the union. None if it has none."""
    return next(((*get_args(a),) for a in alternatives(annotation) if get_origin(a) is dict), None)


def takes_text(annotation: Any) -> bool:
    """Whether text or a path is a valid type for the value."""
    return any(a in (str, Path) for a in alternatives(annotation))


def read_words(text: str, annotation: Any, where: str) -> Any:
    """Read a value from the command line or the environment, where the shell has removed the quotes.

    For a key that takes text, the words are the value: `--trainer.run_name 007` and `'"007"'` give the same. For other
    keys they are parsed as YAML.

    Args:
        text: The words.
        annotation: Type of the key.
        where: The option or variable, for messages.

    Raises:
        ConfigError: The words are not YAML.
    """
    if takes_text(annotation) and not text.lstrip().startswith(("'", '"')):
        return None if text in NULLS else Plain(text)
    return read_value(text, where)


def typed(value: Any, annotation: Any) -> Any:
    """Convert a value to the type of its key, for pydantic to validate.

    Raises:
        ValueError: Words without quotes have several possible meanings.
    """
    if isinstance(value, Plain):
        return _typed_word(value, annotation)
    if value is None:
        return _typed_nothing(annotation)
    if isinstance(value, list):
        return [typed(item, _item_type(annotation)) for item in value]
    if isinstance(value, dict):
        return {str(key): typed(item, _value_type(annotation, str(key))) for key, item in value.items()}
    return value


def _typed_nothing(annotation: Any) -> Any:
    kinds = tuple(alternatives(annotation))
    if is_section(annotation):
        return {}
    if type(None) not in kinds and Any not in kinds:
        hint = ", or quote the word" if takes_text(annotation) else ""
        raise ValueError(f"got nothing (null), expected a value. Fix: leave the key out for its default{hint}.")
    return None


def is_section(annotation: Any) -> bool:
    """Whether an empty value means a mapping without keys, as in `optim:` with all its keys commented out."""
    kinds = tuple(alternatives(annotation))
    return type(None) not in kinds and (model_of(annotation) or mapping_of(annotation)) is not None


def _item_type(annotation: Any) -> Any:
    return next((get_args(a)[0] for a in alternatives(annotation) if get_origin(a) in (tuple, list)), Any)


def _value_type(annotation: Any, key: str) -> Any:
    if model := model_of(annotation):
        return model.model_fields[key].annotation if key in model.model_fields else Any
    mapping = mapping_of(annotation)
    return mapping[1] if mapping else Any


def _typed_word(word: Plain, annotation: Any) -> Any:
    kinds = set(alternatives(annotation))
    if takes_text(annotation):
        if word.line is not None and not is_text(word):
            kind = kind_of(word) or kind_in_yaml_1_1(word)
            raise ValueError(
                f"got {word} without quotes, which YAML reads as {kind}; expected text. Fix: {_quote(word)}"
            )
        return str(word)
    if has_leading_zero(word) or (Any in kinds and means_two_things(word)):
        raise ValueError(_two_readings(word))
    value = value_of(word)
    if isinstance(value, int) and abs(value) >= LARGEST and Any not in kinds:
        raise ValueError(f"got {word}, expected a number below 2**63")
    # pydantic would accept true as the number 1.
    is_misplaced_bool = isinstance(value, bool) and not kinds & {bool, Any}
    return str(word) if value is word or is_misplaced_bool else value


def _two_readings(word: Plain) -> str:
    """Return the message: `got on without quotes, which YAML 1.1 reads as … and YAML 1.2 as text. Fix: …`."""
    older = kind_in_yaml_1_1(word) or "text"
    newer = kind_of(word) or "text"
    if has_leading_zero(word):
        other = f"write {int(word)} for the number"
        if set(word) <= set("+-01234567"):
            older = str(int(word, 8))
            newer = str(int(word))
    else:
        other = {"true or false": "write true or false", "a number": "write the number in digits"}.get(older, "")
    fix = f"{_quote(word)}{', or ' + other if other else ''}"
    return f"got {word} without quotes, which YAML 1.1 reads as {older} and YAML 1.2 as {newer}. Fix: {fix}"


def _quote(word: Plain) -> str:
    quoted = f'"{word}"'
    return f"quote text: {quoted}" if word.line is not None else f"quote text, also for the shell: '{quoted}'"
