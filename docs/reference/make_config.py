"""Write docs/reference/config.md from the configuration models (`make docs`)."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tables import code, table

from tandem_protocol.config.names import ProjectName
from tandem_protocol.config.project import ProjectSettings

SECTIONS = {name: field.annotation for name, field in ProjectSettings.model_fields.items()}

HEAD = """\
# Configuration

Written by `docs/reference/make_config.py` from the configuration models. To change a text, edit it there.

A project's `config.yaml` has the sections `shared`, `generator` and `trainer`. A key can be set in four places. The
last one that sets it wins:

1. the default;
2. `config.yaml`;
3. the environment: `TANDEM__TRAINER__OPTIM__LEARNING_RATE=1e-5`;
4. the command line: `--trainer.optim.learning_rate 1e-5`.

`--check` prints every value with its source. Relative paths start at the folder of `config.yaml`. The bearer token is
not a key: it comes from the variable `TANDEM_TOKEN`, or from the file that `TANDEM_TOKEN_FILE` names.

## How values are read

A key's type decides how a word without quotes is read: `learning_rate: 1e-5` is a number, and `shuffle: yes` is true.

- **Text** needs quotes if any version of YAML would read something else: `run_name: "007"`, `revision: "1e5"`,
  `env: {DEBUG: "on"}`, `run_name: "2026-11-25"`. Without quotes the key is refused, and the message says what to write.
- **Mappings that take any key** (`generator.vllm`, `arguments`, `chat_template_kwargs`, `tools`) follow YAML 1.2:
  `1e-5` is a number. A word that YAML 1.1 reads differently (`on`, `no`, `007`, `1_000`, `1:30`, dates) is refused.
  Write `true` or `false`, plain digits, or quotes.
- **A key may appear only once.** A second one is refused, and the message names both lines. `<<` may be overridden.
- **An empty section** (`optim:` without keys) has its defaults.

The environment and the command line follow the same rules, with one difference, because a shell removes quotes: a key
for text takes the words as they are. `--trainer.run_name 007` and `--trainer.run_name '"007"'` are the same. For a
mapping that takes any key, protect the quotes from the shell: `--generator.vllm.tokenizer_mode '"no"'`. If an option
appears several times, the last one wins.

In the name of a variable, two underscores separate the parts. Keys of a mapping that takes any key keep their case and
their dots: `TANDEM__GENERATOR__ENV__VLLM_LOGGING_LEVEL=DEBUG`. If `config.yaml` has the same key in another case, the
variable overrides that key.
"""


def page() -> str:
    return HEAD + "".join(part for key, model in SECTIONS.items() for part in tables(key, model))


def describe(field: FieldInfo) -> str:
    """Return the field's docstring, with None as it is written in YAML."""
    return re.sub(r"\bNone(?=:)", "`null`", field.description or "")


def tables(key: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield the section of `model`, then a section for each model among its fields."""
    summary = (model.__doc__ or "").splitlines()[0]
    yield f"\n## `{key}`\n\n{summary}\n"
    nested = {}
    rows = []
    for name, field in model.model_fields.items():
        if inner := next(filter(is_model, parts(field.annotation)), None):
            is_list = typing.get_origin(field.annotation) is tuple
            nested[f"{key}.{name}[]" if is_list else f"{key}.{name}"] = inner
        rows.append([code(name), type_of(field.annotation), default_of(field), describe(field)])
    yield table(["key", "type", "default", "description"], rows)
    for inner_key, inner in nested.items():
        yield from tables(inner_key, inner)


def is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in typing.get_args(annotation):
        yield from parts(argument)


def type_of(annotation: Any) -> str:
    """The values that a key takes, for people who write YAML: `` `int` or `null` ``."""
    if values := getattr(annotation, "__members__", None):
        return " or ".join(code(member.value) for member in values.values())
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(code(value) for value in typing.get_args(annotation))
    if is_model(annotation) or any(map(is_model, typing.get_args(annotation))):
        return "see below"
    if annotation == ProjectName:
        return code("module:name")
    annotation = without_bounds(annotation)
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return " or ".join(map(type_of, typing.get_args(annotation)))
    if annotation is type(None):
        return code("null")
    is_plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return code(annotation.__name__ if is_plain else str(annotation).replace("typing.", ""))


def without_bounds(annotation: Any) -> Any:
    """Remove bounds: `tuple[Annotated[int, Ge(0)], ...]` → `tuple[int, ...]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return without_bounds(arguments[0])
    return origin[tuple(map(without_bounds, arguments))] if origin in (dict, tuple) else annotation


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    return code(json.dumps(field.default, default=str))


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(page())
