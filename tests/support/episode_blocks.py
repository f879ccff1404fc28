"""Check what the pages define for episodes: tools, parsers, environments and agents."""

from __future__ import annotations

import inspect
from typing import Any

from tandem_rollout.environments.instances import Kind
from tandem_rollout.tools import Tool


def _calls_are_read(parser: Any) -> None:
    assert parser("Hm.\nCALL multiply a=1 b=2") == ("Hm.", [("multiply", {"a": "1", "b": "2"})])


def _is_environment(kind: type) -> None:
    tools = Kind.of(kind)
    assert (set(tools.methods), tools.gives_rewards) == ({"guess"}, True)


def _is_agent(run: Any) -> None:
    assert list(inspect.signature(run).parameters) == ["row", "client"]


EPISODES: dict[str, Any] = {
    "multiply": Tool.of, "read_calls": _calls_are_read, "Guess": _is_environment, "run": _is_agent,
}  # fmt: skip
"""What the pages define for episodes → how it is checked."""
