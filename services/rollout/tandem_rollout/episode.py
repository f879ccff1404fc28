"""Play episodes: the policy and the environment take turns until one of them ends it, or a limit is reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tandem_protocol.messages import Completion

from .environments.base import Environment, EnvironmentFailed, EnvironmentLost, Environments, Row, Start
from .recorder import History, Recorder
from .rendering import Conversation, Renderer
from .trajectory import Group, Status, Timings, Trajectory
from .turns import Turn, TurnReader


class Sample(Protocol):
    """Samples one turn of one episode from the policy."""

    async def __call__(self, prompt_ids: tuple[int, ...], *, max_tokens: int, turn: int) -> Completion:
        """Sample a turn.

        Args:
            prompt_ids: everything before the turn. It extends the prompt and the tokens of the turn before.
            max_tokens: longest turn.
            turn: number of the turn in the episode, from 0. Together with the episode's seed it gives the turn's seed.
                If the episode is tried again because of what was sampled, the number counts on.

        Returns:
            A turn that ended by itself or has `max_tokens` tokens, never an aborted one.
        """


Score = Callable[[Row, Sequence[Trajectory], Sequence[Any]], Awaitable[Sequence[Trajectory]]]
"""Adds rewards to the trajectories of a group. The last argument has the project's environment objects."""


@dataclass(frozen=True)
class Limits:
    """When an episode ends at the latest."""

    max_tokens: int
    """Tokens behind the first prompt: sampled ones, and those of tools and users between them."""
    max_turns: int
    """Turns of the policy."""
    max_turn_tokens: int | None = None
    """Tokens of one turn. A turn that reaches it is cut off, and the episode goes on. None: no limit of its own."""
    max_model_len: int | None = None
    """Longest context of the model. None: no limit."""


@dataclass(frozen=True)
class Player:
    """Plays episodes with one model."""

    renderer: Renderer
    reader: TurnReader
    limits: Limits
    history: History = "keep"

    async def play(self, environment: Environment, row: Row, sample: Sample) -> Trajectory:
        """Play one episode. The caller closes the environment.

        Raises:
            Exception: whatever `sample` raised. Errors of the environment become a failed trajectory.
        """
        return await _Episode(self, environment, sample).play(row)

    async def play_group(
        self,
        environments: Environments,
        row: Row,
        index: int,
        samples: Sequence[Sample],
        score: Score | None = None,
        *,
        attempts: int = 2,
    ) -> Group:
        """Play the episodes of one row at the same time, one for each of `samples`, and score them together.

        Args:
            index: index of the row in the data set.
            score: None: the reward of a trajectory is the sum of the environment's own rewards.
            attempts: how often an episode is tried, each time with another environment. After an error of the
                environment, the turns get other seeds, because the same ones would cause it again. After a lost
                connection they get the same, so that the run does not depend on the network.
        """
        opened: dict[Environment, bool] = {}
        """Environments to close, and whether their episode has failed or has not ended."""
        closing: list[asyncio.Task[None]] = []
        """They go on if another episode of the group fails."""

        def close(environment: Environment) -> asyncio.Task[None]:
            closing.append(asyncio.create_task(environment.close(failed=opened.pop(environment))))
            return closing[-1]

        async def play(sample: Sample) -> tuple[Trajectory, Environment]:
            first_turn = 0
            for remaining in reversed(range(attempts)):
                opened[environment := environments.make()] = True
                episode = _Episode(self, environment, sample, first_turn)
                trajectory = await episode.play(row)
                first_turn += 0 if episode.lost else episode.turns
                opened[environment] = failed = trajectory.status == "failed"
                is_last = not failed or not remaining
                # Only the project's objects are scored. An environment that is kept without need takes a place on its
                # server, and the other episodes of the group may wait for one.
                if environment.instance is None or not is_last:
                    await asyncio.wait({close(environment)})
                if is_last:
                    break
            return trajectory, environment

        try:
            async with asyncio.TaskGroup() as tasks:
                playing = [tasks.create_task(play(sample)) for sample in samples]
            trajectories, used = zip(*(task.result() for task in playing), strict=True)
            if score is None:
                return Group(row=index, trajectories=tuple(map(_own_reward, trajectories)))
            scored = await score(row, trajectories, [environment.instance for environment in used])
            return Group(row=index, trajectories=tuple(scored))
        except ExceptionGroup as errors:  # its first error has a readable message
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        finally:
            for environment in list(opened):
                close(environment)
            await asyncio.gather(*closing, return_exceptions=True)


def _own_reward(trajectory: Trajectory) -> Trajectory:
    given = [reward for reward in trajectory.rewards.values() if reward is not None]
    return trajectory.model_copy(update={"reward": sum(given) if given else None})


@dataclass
class _Episode:
    """An episode under way."""

    player: Player
    environment: Environment
    sample: Sample
    first_turn: int = 0
    """Number of the first turn for `sample`."""
    lost: bool = False
    """Whether the connection to the environment was lost."""
    turns: int = 0
    used_tokens: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    decode_s: float = 0.0
    environment_s: float = 0.0
    messages: Conversation = field(default_factory=list)
    """What people read."""
    context: Conversation = field(default_factory=list)
    """What is rendered. It differs if the policy continues a message of the prompt."""

    async def play(self, row: Row) -> Trajectory:
        begin_s = time.monotonic()
        recorder = Recorder(self.player.renderer, self.player.history)
        rewards: dict[str, float | None] = {}
        opening = 0
        reason = None
        try:
            start = await self._timed(self.environment.reset(row))
            self.messages, self.context, opening = list(start.messages), list(start.messages), len(start.messages)
            status = await self._take_turns(recorder, start)
            rewards = await self._timed(self.environment.rewards())
        except EnvironmentFailed as error:
            status, reason = "failed", str(error)
            self.lost = isinstance(error, EnvironmentLost)
        return Trajectory(
            sequences=recorder.sequences(),
            messages=tuple(self.messages),
            num_prompt_messages=opening,
            rewards=rewards,
            status=status,
            reason=reason,
            turns=self.turns,
            tool_calls=self.tool_calls,
            tool_errors=self.tool_errors,
            timings=Timings(
                total_s=time.monotonic() - begin_s, decode_s=self.decode_s, environment_s=self.environment_s
            ),
        )

    async def _take_turns(self, recorder: Recorder, start: Start) -> Status:
        prompt = start.token_ids or self._rendered(recorder, start, [])
        while (room := self._room(prompt)) > 0:
            completion = await self._sampled(prompt, room)
            turn = self.player.reader.read(completion.token_ids, prompt, start.tools)
            self._say(turn)
            recorder.record(self.context, start.tools, prompt, completion)
            if completion.finish_reason == "length" and self._room(prompt + completion.token_ids) <= 0:
                return "max_tokens"
            step = await self._timed(self.environment.step(turn))
            self.tool_calls += step.tool_calls
            self.tool_errors += step.tool_errors
            if step.done:
                return "finished"
            if self.turns == self.player.limits.max_turns:
                return "max_turns"
            following = self._rendered(recorder, start, step.messages)
            self.used_tokens += max(0, len(following) - len(prompt) - len(completion.token_ids))
            if self._room(following) <= 0:
                return "max_tokens"
            self.messages += step.messages
            self.context += step.messages
            prompt = following
        return "max_tokens"

    async def _sampled(self, prompt: tuple[int, ...], room: int) -> Completion:
        begin_s = time.monotonic()
        most = min(room, self.player.limits.max_turn_tokens or room)
        completion = await self.sample(prompt, max_tokens=most, turn=self.first_turn + self.turns)
        self.decode_s += time.monotonic() - begin_s
        self.turns += 1
        self.used_tokens += len(completion.token_ids)
        return completion

    def _say(self, turn: Turn) -> None:
        self.messages.append(turn.message)
        last = self.context[-1]
        if last["role"] == "assistant":  # the policy continued this message
            self.context[-1] = {**last, **turn.message, "content": (last["content"] or "") + turn.message["content"]}
        else:
            self.context.append(turn.message)

    def _rendered(self, recorder: Recorder, start: Start, added: Conversation) -> tuple[int, ...]:
        try:
            return recorder.prompt([*self.context, *added], start.tools)
        except Exception as error:  # a template can raise anything: it is a program by the model's authors
            raise EnvironmentFailed(f"the chat template refuses the environment's answer: {error}") from error

    def _room(self, prompt: tuple[int, ...]) -> int:
        """How many tokens may follow `prompt`."""
        limits = self.player.limits
        room = limits.max_tokens - self.used_tokens
        return room if limits.max_model_len is None else min(room, limits.max_model_len - len(prompt))

    async def _timed(self, awaitable: Awaitable[Any]) -> Any:
        begin_s = time.monotonic()
        try:
            return await awaitable
        finally:
            self.environment_s += time.monotonic() - begin_s
