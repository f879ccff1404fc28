"""Generate docs/reference/config.md from the configuration models: `.venv/bin/python docs/reference/make_config.py`."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import tandem_generator.config
import tandem_trainer.config
from tandem_protocol.config import SharedConfig

SECTIONS: dict[str, type[BaseModel]] = {
    "shared": SharedConfig,
    "generator": tandem_generator.config.GeneratorConfig,
    "trainer": tandem_trainer.config.TrainerConfig,
}

HEAD = """\
# Configuration

This page is generated from the configuration models by `docs/reference/make_config.py`. Edit the models instead.

A project's `config.yaml` has three sections: `shared`, `generator` and `trainer`. A key can be set in four places.
Later ones override earlier ones:

1. The default of the key.
2. `config.yaml`.
3. An environment variable: `TANDEM__TRAINER__OPTIM__LEARNING_RATE=1e-5`.
4. The command line: `--trainer.optim.learning_rate 1e-5`.

`--check` prints every value with its source. Relative paths start at the folder of `config.yaml`. The bearer token is
not a key. Set it in `TANDEM_TOKEN`, or in a file whose path is in `TANDEM_TOKEN_FILE`.

## How values are read

The type of a key decides how a word without quotes is read: `learning_rate: 1e-5` is a number, `shuffle: yes` is true.

- **Text** needs quotes if any version of YAML would read something else: `run_name: "007"`, `revision: "1e5"`,
  `env: {DEBUG: "on"}`, `run_name: "2026-11-25"`. Without quotes, the value is refused, and the message says what to
  write.
- **Mappings that accept any value** (`generator.vllm`, `arguments`, `chat_template_kwargs`, `tools`) follow YAML 1.2:
  `1e-5` is a number. Words that YAML 1.1 reads differently (`on`, `no`, `007`, `1_000`, `1:30`, dates) are refused.
  Write `true` or `false`, a number in plain digits, or quotes.
- **Duplicate keys** are refused, with both line numbers. Keys from a merge (`<<`) may be overridden.
- **Empty sections** (`optim:` with nothing below it) keep their defaults.

Environment variables and the command line follow the same rules, with one exception, because a shell removes quotes:
for a key that takes text, the words are the value. `--trainer.run_name 007` and `--trainer.run_name '"007"'` are the
same. For a key that accepts any value, protect the quotes from the shell: `--generator.vllm.tokenizer_mode '"no"'`. If
an option is given several times, the last one wins.

In the name of a variable, two underscores separate the parts of a key. Keys of mappings such as `generator.env` keep
their case and their dots: `TANDEM__GENERATOR__ENV__VLLM_LOGGING_LEVEL=DEBUG`. If `config.yaml` has the same key in
another case, the variable sets that key.
"""


def page() -> str:
    """Return the complete page."""
    return HEAD + "".join(part for key, model in SECTIONS.items() for part in tables(key, model))


def tables(key: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield a table for `model` and one for each model among its fields."""
    summary = (model.__doc__ or "").splitlines()[0]
    yield f"\n## `{key}`\n\n{summary}\n\n| key | type | default | description |\n|---|---|---|---|\n"
    nested = {}
    for name, field in model.model_fields.items():
        if inner := next(filter(is_model, parts(field.annotation)), None):
            many = typing.get_origin(field.annotation) is tuple
            nested[f"{key}.{name}[]" if many else f"{key}.{name}"] = inner
        yield f"| `{name}` | {type_of(field.annotation)} | {default_of(field)} | {description_of(field)} |\n"
    for inner_key, inner in nested.items():
        yield from tables(inner_key, inner)


def is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in typing.get_args(annotation):
        yield from parts(argument)


def type_of(annotation: Any) -> str:
    if values := getattr(annotation, "__members__", None):
        return " or ".join(f"`{member.value}`" for member in values.values())
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if is_model(annotation) or any(map(is_model, typing.get_args(annotation))):
        return "see below"
    annotation = without_bounds(annotation)
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return cell(f"`{annotation.__name__ if plain else str(annotation).replace('typing.', '')}`")


def without_bounds(annotation: Any) -> Any:
    """`tuple[Annotated[int, Ge(0)], ...]` → `tuple[int, ...]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return without_bounds(arguments[0])
    return origin[tuple(map(without_bounds, arguments))] if origin in (dict, tuple) else annotation


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    return cell(f"`{json.dumps(field.default, default=str)}`")


def description_of(field: FieldInfo) -> str:
    """Return the field's docstring, with None as it is written in YAML."""
    return cell(re.sub(r"\bNone(?=:)", "`null`", field.description or ""))


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(page())
