"""One YAML for the whole stack, and where each of its values came from.

Sections `shared`, `generator`, `trainer`; each service validates its own and `shared`. Last wins: defaults, YAML,
environment (`TANDEM__TRAINER__OPTIM__LEARNING_RATE`), command line. Secrets never stand in it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

SECTIONS = ("shared", "generator", "trainer")
ENV_PREFIX = "TANDEM__"
TOKEN_ENV = "TANDEM_TOKEN"
TOKEN_FILE_ENV = "TANDEM_TOKEN_FILE"


class Section(BaseModel):
    """Base of all configuration models. The text below a field is its description in docs/config.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SharedConfig(Section):
    """What both services must agree on."""

    model: str
    """Directory of a Hugging Face model, or its id on the hub."""
    revision: str | None = None
    trust_remote_code: bool = False
    weights_dir: Path = Path("weights")
    """Root of the weight store; the same volume on both sides."""
    generators: tuple[str, ...] = Field(("http://127.0.0.1:8000",), min_length=1)
    """Base URL of every generator replica; a version is published when all of them serve it."""

    @field_validator("generators")
    @classmethod
    def _are_base_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
                raise ValueError(f"{url} is no base URL such as http://127.0.0.1:8000")
            parts.port  # noqa: B018 - raises for a port that is none
        return tuple(url.rstrip("/") for url in urls)


SettingsT = TypeVar("SettingsT", bound=BaseModel)


class ConfigError(ValueError):
    """The configuration does not hold together; the message says which key, what was got and what was wanted."""


class Resolved(Section):
    """A value of the resolved configuration and where it came from."""

    key: str
    value: Any
    source: str


def load(
    settings: type[SettingsT],
    *,
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[SettingsT, dict[str, str]]:
    """Merge the sources into `settings` (a model with some of SECTIONS as fields).

    Keys that `settings` does not have are refused, unless it ignores them (`extra="ignore"`: a tool that reads a few
    keys of a configuration whose owners check the rest).

    Args:
        path: the YAML file. Its folder is the project; the services run in it, so that is where relative paths start.
        overrides: dotted key → value, from the command line.
        defaults: dotted key → value, below everything else.

    Returns:
        The settings, and dotted key → source for every value that is not the model's default.

    Raises:
        ConfigError: a key that does not exist (with the one that was meant), or a value that does not fit.
    """
    layers = [
        ("default of the caller", defaults or {}),
        (str(path), {} if path is None else _read_yaml(path)),
        ("environment", _from_env(os.environ if env is None else env)),
        ("command line", overrides or {}),
    ]

    values: dict[str, Any] = {section: {} for section in settings.model_fields}
    sources: dict[str, str] = {}
    known = None if settings.model_config.get("extra") == "ignore" else set(_keys(settings))
    for source, layer in layers:
        for key, value in _flatten(layer):
            section = key.split(".", 1)[0]
            if section in SECTIONS and section not in settings.model_fields:
                continue  # another service's section
            if known is not None:
                _check_key(key, known, source)
            if value == {} and any(k.startswith(f"{key}.") for k in sources):
                continue  # sources are merged: an empty section takes nothing away
            _put(values, key, value)
            sources = {k: s for k, s in sources.items() if not k.startswith(f"{key}.")} | {key: source}
    try:
        return settings.model_validate(values), sources
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, sources, path) for problem in error.errors())) from error


def resolved(settings: BaseModel, sources: Mapping[str, str]) -> list[Resolved]:
    """Every value with where it came from, for `--check` and for the run's folder."""
    return [
        Resolved(key=key, value=value, source=sources.get(key, "default"))
        for key, value in _flatten(settings.model_dump(mode="json"))
    ]


def format_resolved(settings: BaseModel, sources: Mapping[str, str]) -> str:
    """The same, one `key: value  # source` a line."""
    rows = resolved(settings, sources)
    width = max(len(row.key) for row in rows)
    return "\n".join(f"{row.key:<{width}}  {row.value!r}  # {row.source}" for row in rows)


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """`--trainer.max_steps 5` or `--trainer.max_steps=5` → `{"trainer.max_steps": 5}`; values are read as YAML.

    Raises:
        ConfigError: an argument of another form, a value that is missing or no YAML.
    """
    overrides, rest = {}, iter(arguments)
    for argument in rest:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key.split(".", 1)[0] not in SECTIONS or "." not in key:
            wanted = f"--SECTION.KEY VALUE, SECTION being one of {', '.join(SECTIONS)}"
            raise ConfigError(f"unknown argument {argument!r}; wanted an option from --help, or {wanted}")
        value = text if equals else next(rest, None)
        if value is None:
            raise ConfigError(f"{argument} has no value; wanted {argument} VALUE")
        overrides[key] = _read_value(value, argument)
    return overrides


def read_token(env: Mapping[str, str] | None = None) -> str | None:
    """The bearer token, from the file that TANDEM_TOKEN_FILE names or from TANDEM_TOKEN; None when neither is set.

    Raises:
        ConfigError: the file cannot be read, or the token is empty or no printable word.
    """
    env = os.environ if env is None else env
    if file := env.get(TOKEN_FILE_ENV):
        try:
            token = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{TOKEN_FILE_ENV}={file} cannot be read: {error}") from error
        where = f"the file that {TOKEN_FILE_ENV} names"
    elif TOKEN_ENV in env:
        token, where = env[TOKEN_ENV].strip(), TOKEN_ENV
    else:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where} holds no usable token; wanted one word of printable ASCII")
    return token


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds {type(content).__name__}; wanted a mapping with sections {', '.join(SECTIONS)}"
        )
    return content


def _read_value(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: got {text!r}; wanted a YAML value: {error}") from error


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    """`TANDEM__A__B=1` → `a.b: 1`; values are read as YAML, so numbers, lists and null work."""
    return {
        name.removeprefix(ENV_PREFIX).lower().replace("__", "."): _read_value(value, name)
        for name, value in env.items()
        if name.startswith(ENV_PREFIX)
    }


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of `model`, inner nodes too; `prefix.*` where a mapping takes any key."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        annotation = field.annotation
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _keys(candidate, f"{key}.")
            elif getattr(candidate, "__origin__", candidate) is dict:
                yield f"{key}.*"


def _check_key(key: str, known: set[str], source: str) -> None:
    parents = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
    if key in known or any(f"{parent}.*" in known for parent in parents):
        return
    by_leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], {k.rsplit(".", 1)[-1] for k in known}, n=1)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75) or [
        k for k in sorted(known) if by_leaf and k.rsplit(".", 1)[-1] == by_leaf[0]
    ]
    hint = f"did you mean {near[0]!r}?" if near else f"the sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"unknown configuration key {key!r} (from {source}); {hint}")


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if not isinstance(child, dict):
            child = tree[parent] = {}
        tree = child
    tree[leaf] = value


def _explain(problem: Any, sources: Mapping[str, str], path: Path | None) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    named = [
        s for k, s in sources.items() if f"{key}.".startswith(f"{k}.")
    ]  # a list's items have no source of their own
    where = named[-1] if named else str(path or "defaults")
    if problem["type"] == "missing":
        return (
            f"{key} is missing; set it in {path or 'the YAML file'} or as {ENV_PREFIX}{key.upper().replace('.', '__')}"
        )
    if problem["type"] == "value_error":  # a validator of ours, which says what it got; the input is a whole section
        return f"{key} (from {where}): {problem['ctx']['error']}"
    return f"{key}: got {problem['input']!r} (from {where}); {problem['msg']}"
