"""Check what the pages define for episodes: tools, parsers, environments and agents."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from tandem_rollout.environments import Done
from tandem_rollout.environments.instances import Kind
from tandem_rollout.tools import Tool


def _calls_are_read(parser: Any) -> None:
    assert parser("Hm.\nCALL multiply a=1 b=2") == ("Hm.", [("multiply", {"a": "1", "b": "2"})])


def _is_environment(kind: type) -> None:
    tools = Kind.of(kind)
    assert (set(tools.methods), tools.gives_rewards) == ({"guess"}, True)


def _answers_in_text(kind: type) -> None:
    riddle: Any = kind()
    riddle.reset(answer="42")
    said = [asyncio.run(riddle.step({"role": "assistant", "content": text})) for text in ("It is 7.", "It is 42.")]
    assert Kind.of(kind).answers_in_text
    assert (said, riddle.get_reward()) == (["No. Try again.", Done()], 1.0)


def _is_agent(run: Any) -> None:
    assert list(inspect.signature(run).parameters) == ["row", "client"]


EPISODES: dict[str, Any] = {
    "multiply": Tool.of, "read_calls": _calls_are_read, "Guess": _is_environment,
    "Riddle": _answers_in_text, "run": _is_agent,
}  # fmt: skip
"""What the pages define for episodes → how it is checked."""
