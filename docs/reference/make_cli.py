"""Write cli.md from the parsers of the commands (`make docs`)."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from tables import code, plain, table

import tandem_cli.__main__
import tandem_generator.__main__
import tandem_rollout.server
import tandem_trainer.__main__

COMMANDS: dict[str, Callable[[Sequence[str]], Any]] = {
    "tandem": tandem_cli.__main__.main,
    "python -m tandem_generator": tandem_generator.__main__.main,
    "python -m tandem_rollout.server": tandem_rollout.server.main,
    "python -m tandem_trainer": tandem_trainer.__main__.main,
}

HEAD = """\
# Command line

Written by `docs/reference/make_cli.py` from the commands' own `--help`. To change a text, edit it there.
"""


def page() -> str:
    return HEAD + "".join(part for name, main in COMMANDS.items() for part in sections(name, parser_of(main)))


class _Found(BaseException):
    """Carries a parser out of the `main` that made it."""


def parser_of(main: Callable[[Sequence[str]], Any]) -> argparse.ArgumentParser:
    """Return the parser that `main` makes, at the moment when `main` would use it."""

    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Found(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            main([])
        except _Found as found:
            (parser,) = found.args
            return parser
    raise AssertionError("main() did not parse its arguments")


def sections(name: str, parser: argparse.ArgumentParser, level: int = 2) -> Iterator[str]:
    """Yield the section of one command, then a section for each of its subcommands."""
    yield f"\n{'#' * level} `{name}`\n"
    yield paragraphs(parser, parser.description)
    yield f"\n```text\n{synopsis(name, parser)}\n```\n"
    positionals, options, *groups = parser._action_groups
    yield arguments(parser, [*positionals._group_actions, *options._group_actions])
    for group in groups:
        if not group.description and not group._group_actions:
            continue
        yield f"\n**{str(group.title)[:1].upper()}{str(group.title)[1:]}**\n"
        yield paragraphs(parser, group.description)
        yield arguments(parser, group._group_actions)
    yield paragraphs(parser, parser.epilog)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from sections(f"{name} {word}", command, level + 1)


def synopsis(name: str, parser: argparse.ArgumentParser) -> str:
    """`tandem export RUN --to DIR [options]`. Options come first if the rest belongs to another program."""
    words, rest = [name], []
    for action in parser._actions:
        if action.nargs == argparse.REMAINDER:
            rest = [words.pop(), f"[{metavar(action)} ...]"]
        elif not action.option_strings:
            words.append(f"[{metavar(action)}]" if action.nargs in ("?", "*") else metavar(action))
        elif action.required:
            words.append(f"{action.option_strings[-1]} {metavar(action)}")
    return " ".join([*words, "[options]", *rest])


def arguments(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> str:
    """A table of arguments, or of subcommands."""
    rows = [row for action in actions if action.help != argparse.SUPPRESS for row in rows_of(parser, action)]
    return table(["argument", "description"], rows) if rows else ""


def rows_of(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[list[str]]:
    if isinstance(action, argparse._SubParsersAction):
        for choice in action._choices_actions:
            yield [code(choice.dest), plain(choice.help or "")]
    elif "--help" not in action.option_strings:
        value = "" if action.nargs == 0 else metavar(action)
        names = [f"{option} {value}".strip() for option in action.option_strings] or [value]
        text = parser._get_formatter()._expand_help(action) if action.help else ""
        yield [", ".join(map(code, names)), plain(text)]


def metavar(action: argparse.Action) -> str:
    """What stands for an argument's value: `PORT`, `{nvidia,cdi}`, `[BOOL]`."""
    formatter = argparse.HelpFormatter(prog="")
    if not action.option_strings:
        return str(formatter._metavar_formatter(action, action.dest)(1)[0])
    return formatter._format_args(action, action.dest.upper())


def paragraphs(parser: argparse.ArgumentParser, text: str | None) -> str:
    """A description or an epilog. Indented lines, such as exit codes, become a block; examples one of shell."""
    text = (text or "").replace("%(prog)s", parser.prog).strip()
    written = []
    for block, prose in re.findall(r"((?:^ .*\n|^\n)+)|((?:^\S.*\n)+)", f"{text}\n", re.MULTILINE):
        if prose:
            written.append(plain(prose[:1].upper() + prose[1:]))
        elif block.strip():
            language = "sh" if written and written[-1].startswith("Example") else "text"
            written.append(f"```{language}\n{textwrap.dedent(block).strip()}\n```\n")
    return "".join(f"\n{part}" for part in written)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page())
