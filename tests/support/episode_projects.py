"""Projects with tools, environment classes and agents, for a mock generator that samples random characters."""

from __future__ import annotations

from typing import Any

from support.projects import Project

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}t:{{ tool.function.name }}|{% endfor %}"
    "{% for turn in messages %}{{ turn.role[0] }}:{{ turn.content }}"
    "{% for call in turn.tool_calls or [] %} call {{ call.function.name }}:"
    "{% for name, value in call.function.arguments.items() %}{{ name }}={{ value }} {% endfor %}{% endfor %}"
    "{{ eos_token if turn.role == 'assistant' else '|' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CODE = '''
"""Tools and environments that a policy of random characters uses."""
import os


def count(text: str) -> int:
    """Count the characters.

    Args:
        text: what to count
    """
    if text[:1] in "02468":
        raise ValueError("no even digits")
    return len(text)


def calls(text):
    """A policy calls `count` until what it says ends in a vowel."""
    return (text, []) if text[-1:] in "aeiou" else ("", [("count", {"text": text})])


class Echo:
    """Repeats what the policy says, until it says something short. The row may ask it to break."""

    def reset(self, breaks: bool = False, **columns) -> str:
        self.turns = 0
        if breaks:
            raise RuntimeError("the server is gone")
        return " go"

    async def step(self, message):
        from tandem_rollout.environments import Done

        self.turns += 1
        return Done() if len(message["content"]) < 8 else message["content"][:4]

    def get_reward(self) -> float:
        return self.turns / 4


class Stack:
    """Its public helper `size` is a tool; `_size` is not."""

    def reset(self, **columns) -> None:
        self.items = []

    def push(self, text: str) -> int:
        """Push.

        Args:
            text: what to push
        """
        self.items.append(text)
        return self.size()

    def size(self) -> int:
        """Count."""
        return self._size()

    def _size(self) -> int:
        return len(self.items)

    def get_reward(self) -> float:
        return 0.0


class NoReward:
    """Rewards nothing."""

    def reset(self, **columns) -> None:
        pass


async def ask_twice(row, client):
    """An agent without a library: two calls, the second of which continues the first."""
    import httpx

    messages = list(row["prompt"])
    headers = {"Authorization": f"Bearer {client.api_key}"}
    async with httpx.AsyncClient(base_url=client.base_url, headers=headers, timeout=60) as http:
        for _ in range(2):
            answer = await http.post("/chat/completions", json={"model": client.model, "messages": messages})
            answer.raise_for_status()
            said = answer.json()["choices"][0]["message"]
            messages += [said, {"role": "user", "content": "more"}]
    return len(said["content"]) / 10
'''
PROMPTS = {"chat_template_kwargs": {"chat_template": CHAT_TEMPLATE}}
TOOLS: dict[str, Any] = {"tools": ["episodes:count"], "tool_parser": "episodes:calls"}


def rollout(**settings: Any) -> dict[str, Any]:
    """Settings of `trainer.rollout` for short episodes."""
    return {"num_prompts": 2, "num_generations": 4, "max_completion_length": 60, "max_turns": 4} | settings


def settings(prompts: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Settings of `trainer`, with these changes of `rollout`."""
    return {"prompts": PROMPTS | (prompts or {}), "rollout": rollout(**changes)}


def with_code(project: Project) -> Project:
    """Add the project's tools, environments and agents."""
    (project.directory / "episodes.py").write_text(CODE)
    return project
