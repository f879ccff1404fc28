"""Find the blocks of code in the documentation, and the commands in blocks of shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md", "helm/**/*.md", "services/**/*.md", "cli/**/*.md")
    for path in ROOT.glob(pattern)
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ASSIGNMENT = re.compile(r"^(\w+)=(.*)$", re.DOTALL)
_REDIRECTIONS = {">", ">>", "<", "2>"}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*pages: str, language: str | None = None) -> list[Block]:
    """Return the blocks of these pages, of all languages or of one."""
    found = []
    for page in pages:
        text = (ROOT / page).read_text()
        assert not re.search(r"^([ >]+```|\s*~~~)", text, re.MULTILINE), f"{page}: begin blocks with ``` at the margin"
        assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(_BLOCK.findall(text)), f"{page}: an open block"
        for match in _BLOCK.finditer(text):
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return [block for block in found if language in (None, block.language)]


class Command(NamedTuple):
    words: list[str]
    variables: dict[str, str]
    """Environment variables that are set for this command only."""


def commands(script: str) -> Iterator[Command]:
    """Yield the commands of a script without flow control, also those in pipes and substitutions."""
    for line in _logical_lines(script):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|")
        lexer.commenters, lexer.whitespace_split = "#", True
        words: list[str] = []
        for word in [*lexer, "|"]:
            if word != "|":
                words.append(word)
                continue
            yield from _command(words)
            words = []


def _logical_lines(script: str) -> Iterator[str]:
    """Yield the lines of a script. Lines that a backslash or a quoted string connects come as one."""
    pending = ""
    for line in script.replace("\\\n", " ").splitlines():
        pending += line
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # the quoted string goes on in the next line
            pending += "\n"
            continue
        if pending.strip():
            yield re.sub(r"\$\(([^)]*)\)", lambda inner: f'"$({inner[1]})"', pending)
        pending = ""
    assert not pending, f"a quoted string without an end: {pending}"


def _command(words: list[str]) -> Iterator[Command]:
    variables: dict[str, str] = {}
    while words and (assigned := _ASSIGNMENT.match(words[0])):
        variables[assigned[1]] = assigned[2]
        words = words[1:]
    for word in [*variables.values(), *words]:
        if inner := re.fullmatch(r"\$\((.*)\)", word):
            yield from commands(inner[1])
    words = words[: next((n for n, word in enumerate(words) if word in _REDIRECTIONS), None)]
    if words:
        yield Command(words, variables)
