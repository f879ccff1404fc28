"""The libraries of `make agents`: packages in folders of their own, over those of .venv."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_FOLDERS = Path(__file__).parents[2] / ".venv-agents"
AGENTS, OPENENV, VERIFIERS = (_FOLDERS / name for name in ("agents", "openenv", "verifiers"))


def missing() -> str | None:
    if not (_FOLDERS / "ready").exists() or not VERIFIERS.exists():
        return "the agent libraries are not installed; `make agents` does that"
    if not importlib.util.find_spec("mcp"):
        return "openai-agents needs packages that come with vLLM's CPU build; `make clean setup` prints the reason"
    return None
