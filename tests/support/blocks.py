"""The blocks of code on the pages of the documentation, and the commands in those for a shell."""

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


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*pages: str, language: str | None = None) -> list[Block]:
    """All blocks of these pages, or of one language."""
    found = []
    for page in pages:
        text = (ROOT / page).read_text()
        assert not re.search(r"^([ >]+```|\s*~~~)", text, re.MULTILINE), f"{page}: begin blocks with ``` at the margin"
        assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(_BLOCK.findall(text)), f"{page}: unlike ends"
        for match in _BLOCK.finditer(text):
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return [block for block in found if language in (None, block.language)]


class Command(NamedTuple):
    words: list[str]
    variables: dict[str, str]
    """Those that stand before it."""


def commands(script: str) -> Iterator[Command]:
    """The commands of a script without flow control, those in pipes and substitutions included."""
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
    """Lines, and those together that a quoted string spans."""
    pending = ""
    for line in script.splitlines():
        pending += line
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quotation goes on
            pending += "\n"
            continue
        if pending.strip():
            yield re.sub(r"\$\(([^)]*)\)", lambda inner: f'"$({inner[1]})"', pending)
        pending = ""
    assert not pending, f"a quotation without an end: {pending}"


def _command(words: list[str]) -> Iterator[Command]:
    variables: dict[str, str] = {}
    while words and (assigned := _ASSIGNMENT.match(words[0])):
        variables[assigned[1]] = assigned[2]
        words = words[1:]
    for word in [*variables.values(), *words]:
        if inner := re.fullmatch(r"\$\((.*)\)", word):
            yield from commands(inner[1])
    if words:
        yield Command(words, variables)
