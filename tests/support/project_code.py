"""Modules of a user's project, importable for the length of a test."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from textwrap import dedent

import pytest

_NUMBERS = itertools.count()


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """Write a module into `folder`, make it importable, and return its name."""
    name = f"project_code_{next(_NUMBERS)}"
    (folder / f"{name}.py").write_text(dedent(text))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name
