"""Agents of the project: any code that speaks the OpenAI API, `async def run(row, client) -> float | None`."""

from __future__ import annotations

import asyncio
import copy
import functools
import math
import numbers
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .environments.base import Row
from .episode import Limits, Sample, Score
from .functions import plain
from .proxy import Proxy
from .recorder import History
from .rendering import Renderer
from .sessions import Normalize, ReaderFor, Session
from .trajectory import Group, Timings, Trajectory
from .workers import Workers, call


@dataclass(frozen=True)
class AgentClient:
    """What an agent needs to call the policy."""

    base_url: str
    api_key: str
    model: str

    def openai(self, **options: Any) -> Any:
        """Return an `openai.AsyncOpenAI` for this episode. Needs the package `openai`."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # the package is the project's

        if "http_client" not in options:  # by default, each client reads all certificates: 30 ms per episode
            options["http_client"] = DefaultAsyncHttpxClient(verify=_tls())
        return AsyncOpenAI(base_url=self.base_url, api_key=self.api_key, **options)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


Run = Callable[[dict[str, Any], AgentClient], Any]
"""An agent, asynchronous or not. It returns the episode's reward, or None. One that is not runs in a thread."""


@dataclass(frozen=True)
class Agents:
    """Plays episodes of one agent."""

    run: Run
    name: str
    """The name of its reward."""
    proxy: Proxy
    renderer: Renderer
    reader_for: ReaderFor
    normalize: Normalize
    limits: Limits
    timeout_s: float
    """Time limit of an episode."""
    history: History = "keep"
    workers: Workers = field(default_factory=functools.partial(Workers, "agent"))

    async def play_group(
        self, row: Row, index: int, samples: Sequence[Sample], score: Score | None = None, *, attempts: int = 2
    ) -> Group:
        """Play the episodes of one row at the same time, and score them together. See `Player.play_group`."""

        async def play(sample: Sample) -> Trajectory:
            turn = 0  # another attempt counts on, so that its turns have other seeds
            for remaining in reversed(range(attempts)):
                session = self._session(sample, turn)
                trajectory = await self._play(row, session)
                turn = session.next_turn
                if trajectory.status != "failed" or not remaining:
                    break
            return trajectory

        try:
            async with asyncio.TaskGroup() as tasks:
                playing = [tasks.create_task(play(sample)) for sample in samples]
        except ExceptionGroup as errors:  # its first error has a readable message
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        trajectories = [task.result() for task in playing]
        scored = await score(row, trajectories, [None] * len(trajectories)) if score else trajectories
        return Group(row=index, trajectories=tuple(scored))

    async def play(self, row: Row, sample: Sample) -> Trajectory:
        """Play one episode. An agent that raises or is late makes a failed trajectory, unless a limit has ended it.

        Raises:
            Exception: whatever `sample` raised.
        """
        return await self._play(row, self._session(sample, 0))

    def _session(self, sample: Sample, first_turn: int) -> Session:
        return Session(self.renderer, self.reader_for, sample, self.limits, self.normalize, self.history, first_turn)

    async def _play(self, row: Row, session: Session) -> Trajectory:
        begin_s = time.monotonic()
        reward, reason = None, None
        with self.proxy.session(session) as path:
            client = AgentClient(f"{self.proxy.url}{path}", session.key, self.proxy.model)
            columns = copy.deepcopy({"prompt": row.prompt, **row.columns})
            try:
                running = functools.partial(self.run, columns, client)
                reward = _number(self.name, await call(running, self.workers, self.timeout_s))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        if session.error is not None:
            raise session.error
        if session.status != "finished":  # a limit has ended it, which agents notice as an error
            reason = None
        total_s = time.monotonic() - begin_s
        return Trajectory(
            sequences=session.recorder.sequences(),
            messages=tuple(session.messages),
            num_prompt_messages=session.num_prompt_messages,
            rewards={} if reward is None else {self.name: reward},
            reward=reward,
            status="failed" if reason else session.status,
            reason=reason and f"agent {self.name}: {reason}",
            turns=session.turns,
            tool_calls=session.tool_calls,
            timings=Timings(
                total_s=total_s, decode_s=session.decode_s, environment_s=max(0.0, total_s - session.decode_s)
            ),
        )


def _number(name: str, reward: Any) -> float | None:
    if reward is None:
        return None
    reward = plain(reward)
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise ValueError(f"{name} returned {reward!r}, expected a finite number, or None for no reward")
    return float(reward)


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages with text as their content, and without nulls. See `Normalize`.

    Raises:
        ValueError: a message has no role, or a part that is not text.
    """
    return [_plain(message) for message in messages]


def _plain(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"got the message {str(message)[:200]}, expected an object with a role")
    plain = {key: value for key, value in message.items() if value is not None and value != []}
    content = plain.get("content", "")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"got a content that is not text in a message of the role {message['role']!r}")
    return {**plain, "content": "".join(map(str, texts))}
