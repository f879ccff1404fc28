"""Help of a command line, made from the configuration models: `--help` says what docs/reference/config.md says."""

from __future__ import annotations

import argparse
import enum
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .sections import ConfigError
from .values import alternatives, mapping_of, model_of

WORDS = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", dict: "MAPPING", tuple: "LIST"}
"""Type → the placeholder of its value in the help."""
LONGEST_CHOICES = 36
"""In characters. A longer list of choices moves from the option's line to its description."""
EXPLAINS_A_VALUE = re.compile(r"(`[^`]+`|[\w.]+): ")
SENTENCE_ENDS = re.compile(r"(?<=\.)(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`\d])")


ListKeys = Callable[[argparse.ArgumentParser], None]


class HelpFormatter(argparse.HelpFormatter):
    """Wrap paragraphs to the terminal's width, and leave indented lines, such as examples, unchanged."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # argparse forgets that commands are indented once more, and wraps the longest one.
            longest = max(map(len, action.choices))
            self._action_max_length = max(self._action_max_length, longest + self._current_indent + 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(self._fill(paragraph, width, indent) for paragraph in paragraphs)

    def _fill(self, paragraph: str, width: int, indent: str) -> str:
        if "\n  " in paragraph or paragraph.startswith(" "):
            return textwrap.indent(paragraph, indent)
        return textwrap.fill(
            " ".join(paragraph.split()),
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # options have hyphens

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`-tp, --tensor-parallel-size INT`, with the short form first and the value once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        names = ", ".join(sorted(action.option_strings, key=len))
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{names} {value}"


class WideHelpFormatter(HelpFormatter):
    """For long options: put each on its own line, with its description below it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)


class ServiceParser(argparse.ArgumentParser):
    """The command line of a service. A wrong argument is a `ConfigError`, which the service logs."""

    def __init__(self, module: str, usage: str, description: str, epilog: str, list_keys: ListKeys) -> None:
        """
        Args:
            module: the package that `python -m` runs.
            usage: the arguments, without the command.
            list_keys: see `add_help`.
        """
        self.command = f"python -m {module}"
        super().__init__(
            prog=self.command,
            usage=f"{self.command} {usage}",
            description=description,
            epilog=epilog,
            formatter_class=WideHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        add_help(self, list_keys)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Fix: `{self.command} --help` lists the arguments.")


def add_help(parser: argparse.ArgumentParser, list_keys: ListKeys) -> None:
    """Add `-h` and `--help` to a parser without them.

    Args:
        list_keys: adds the YAML keys to the parser before its help is printed. The parser never parses them, because
            `parse_overrides` and `load` do, with better messages.
    """

    class Help(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
            list_keys(parser)
            parser.print_help()
            parser.exit()

    parser.add_argument(
        "-h", "--help", action=Help, nargs=0, default=argparse.SUPPRESS, help="Print this help and exit."
    )


def add_keys(parser: argparse.ArgumentParser, key: str, model: type[BaseModel], *, omit: Callable[[str], bool]) -> None:
    """Add a group with the keys of `model`, and one for each model among its fields.

    Args:
        omit: takes a dotted key; True leaves it out, for a key that has its own option.
    """
    _add_keys(parser, key, model, summary_of(model.__doc__), omit, {})


def _add_keys(
    parser: argparse.ArgumentParser,
    key: str,
    model: type[BaseModel],
    summary: str,
    omit: Callable[[str], bool],
    listed: dict[type[BaseModel], str],
) -> None:
    if model in listed:
        same = f"The keys are those of `{listed[model]}`."
        parser.add_argument_group(f"keys of {key}", summary if listed[model] in summary else f"{summary} {same}")
        return
    listed[model] = key
    fields = {f"{key}.{name}": field for name, field in model.model_fields.items()}
    sections = {name: inner for name, field in fields.items() if (inner := model_of(field.annotation))}
    plain = [name for name in fields if name not in sections and not omit(name)]
    if plain:
        group = parser.add_argument_group(f"keys of {key}", summary)
        for name in plain:
            field = fields[name]
            notes = [f"one key: --{name}.KEY VALUE"] if mapping_of(field.annotation) else []
            text = described(field, summary_of(field.description), *notes)
            group.add_argument(f"--{name}", metavar=metavar_of(field.annotation), help=text)
    for name, inner in sections.items():
        text = summary_of(fields[name].description or inner.__doc__)
        _add_keys(parser, name, inner, text, omit, listed)


def metavar_of(annotation: Any) -> str:
    """Return the placeholder of a value: `INT`, `{vllm,mock}`, `all-linear|LIST`."""
    kinds = [kind for kind in alternatives(annotation) if kind is not type(None)]
    if len(kinds) == 1 and (choices := _choices(kinds[0])):
        braces = f"{{{','.join(choices)}}}"
        return braces if len(braces) <= LONGEST_CHOICES else "NAME"
    words = [word for kind in kinds for word in _choices(kind) or [WORDS.get(get_origin(kind) or kind, "VALUE")]]
    placeholder = "|".join(words)
    return placeholder if len(placeholder) <= LONGEST_CHOICES else "NAME"


def described(field: FieldInfo, text: str, *notes_before: str) -> str:
    """Return a description followed by the choices that the metavar does not show and by the default, for argparse."""
    notes = [*notes_before, *_notes(field.annotation)]
    if field.is_required():
        notes.append("required, here or in config.yaml")
    else:
        notes.append(f"default: {value_text(field.default)}")
    plain = re.sub(r"\bNone(?=:)", "null", " ".join(text.split()))  # as it is written on the command line
    return _escaped(f"{plain} ({'; '.join(notes)})".strip())


def _notes(annotation: Any) -> Iterator[str]:
    for kind in alternatives(annotation):
        if metavar_of(annotation) == "NAME" and (choices := _choices(kind)):
            yield f"one of {', '.join(choices)}"
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            if model := model_of(item):
                yield f"each with the keys {', '.join(model.model_fields)}"
            elif choices := _choices(item):
                yield f"any of {', '.join(choices)}"


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [str(member.value) for member in annotation]
    return []


def value_text(value: Any) -> str:
    """Return a default as it is written in YAML: `true`, `null`, `[]`, `runs`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value.value if isinstance(value, enum.Enum) else value)


def summary_of(text: str | None) -> str:
    """Return the first sentence, and those that explain a value: `0: from all tokens.`"""
    sentences = SENTENCE_ENDS.split(" ".join((text or "").split()))
    return " ".join([*sentences[:1], *(sentence for sentence in sentences[1:] if EXPLAINS_A_VALUE.match(sentence))])


def _escaped(text: str) -> str:
    """Double percent signs, because argparse expands `%(default)s`."""
    return text.replace("%", "%%")
