"""`tandem completion`: a script with which a shell completes the command line of `tandem`."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab

SHELLS = ("bash", "zsh", "fish")


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for one of SHELLS. It completes folders where the parser expects a path.

    The script contains everything that it completes: TAB does not start Python.
    """
    _annotate(parser)
    return shtab.complete(parser, shell)


def _annotate(parser: argparse.ArgumentParser) -> None:
    """Add what shtab reads: folders for paths, and one line as the description of each command."""
    for action in parser._actions:
        if action.type is Path:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # shtab looks for this attribute
        if isinstance(action, argparse._SubParsersAction):
            for entry in action._choices_actions:
                action.choices[entry.dest].description = entry.help
            for command in action.choices.values():
                _annotate(command)
