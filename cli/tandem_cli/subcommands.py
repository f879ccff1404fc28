"""What the parsers of all commands of `tandem` share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from tandem_protocol.config.help import HelpFormatter

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"


class CommandParser(argparse.ArgumentParser):
    """The parser of a command. One with subcommands may have a default, which need not be typed."""

    default: str | None = None

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # it has overloads
        words = list(args or ())
        if self.default and (not words or words[0] not in (*self._names(), "-h", "--help")):
            words.insert(0, self.default)
        return super().parse_known_args(words, namespace)

    def _names(self) -> Iterator[str]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices


def add(commands: Commands, name: str, summary: str, description: str, epilog: str) -> CommandParser:
    """Add a command and return its parser."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
