"""Markdown tables, for the scripts beside this file that write reference pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. A column whose name ends in `:` holds numbers and is aligned to the right."""
    head = [column.removesuffix(":") for column in columns]
    rule = ["---:" if column.endswith(":") else "---" for column in columns]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n" + "".join(f"{line}\n" for line in lines)


def cell(text: str) -> str:
    """Put text on one line, escape what would end the cell, and link to the pages of docs/ that it names."""
    line = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"(?<![`\w/])docs/([\w/-]+\.md)", r"[\g<0>](../\1)", line)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def plain(text: str) -> str:
    """Escape what Markdown would read as markup, except in backticks: for text that was not written as Markdown."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"[\\*]", r"\\\g<0>", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
