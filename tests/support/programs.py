"""The programs that the documentation shows: whether they are here, and which options their help names."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from support import helm
from support.blocks import Command

TIMEOUT_S = 60


def need(program: str, *plugin: str) -> None:
    """Skip the test if a program is missing, or its plugin: `docker` works without `docker compose`.

    The test reads the program's own help or output, so there is nothing to check without it. `.ci/run` has all of them.
    """
    words = [program, *plugin]
    if not shutil.which(program) or (
        plugin and subprocess.run([*words, "version"], capture_output=True, timeout=TIMEOUT_S, check=False).returncode
    ):
        pytest.skip(f"{' '.join(words)} is not installed")


def run(*words: str, cwd: Path | None = None) -> str:
    ended = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


def check_options(command: Command) -> None:
    """Check that each option is in the help of the command or of its parent command."""
    program = command.words[0]
    if program != "helm":
        need(*command.words[: 2 if "compose" in command.words[1:2] else 1])
    help_text = _help(program, *_subcommand(command.words))
    for word in command.words[1 : command.words.index("--") if "--" in command.words else None]:
        if word.startswith("--"):
            assert re.search(rf"{word.partition('=')[0]}\b", help_text), f"{word} is not an option of {command.words}"
        elif word.startswith("-"):
            for letter in word[1:]:
                assert re.search(rf"(^|\s)-{letter}\b", help_text), f"-{letter} is not an option of {command.words}"
        if word.startswith("--overrides="):
            json.loads(word.partition("=")[2])


def _subcommand(words: list[str]) -> list[str]:
    """Return the subcommand: `compose up` of `docker compose -f compose.yaml up`."""
    nested = {"compose": 2, "create": 2}
    with_value = ("-f", "-n", "--profile", "--project-name")
    names = [word for before, word in pairwise(words) if word[0] != "-" and before not in with_value]
    return names[: nested.get(names[0], 1)]


@functools.cache
def _help(program: str, *subcommand: str) -> str:
    if program == "helm":
        if reason := helm.missing():
            pytest.skip(reason)
        return helm.helm(*subcommand, "--help").stdout
    above = run(program, "options") if program == "kubectl" else run(program, *subcommand[:1], "--help")
    return above + run(program, *subcommand, "--help")
