"""The agent libraries of `make agents`: packages in a folder of their own, over those of .venv."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv-agents"


def missing() -> str | None:
    if not (FOLDER / "ready").exists():
        return "the agent libraries are not installed; `make agents` does that"
    if not importlib.util.find_spec("mcp"):
        return "openai-agents needs packages that come with vLLM's CPU build; `make clean setup` prints the reason"
    return None
