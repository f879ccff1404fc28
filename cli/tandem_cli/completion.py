"""`tandem completion`: a script with which a shell completes the command line of `tandem`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import shtab

SHELLS = ("bash", "zsh", "fish")


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for one of SHELLS. It completes folders where the parser expects a path.

    The script holds all that it completes, so that TAB starts no Python.
    """
    for action in _actions(parser):
        if action.type is Path:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # shtab looks for this attribute
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of the parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
