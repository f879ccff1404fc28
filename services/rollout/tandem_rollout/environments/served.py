"""The sessions of an environment server: one for each episode of a client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tandem_protocol.errors import BadRequest, TandemError
from tandem_protocol.repeats import Repeats

from ..errors import UserError
from ..tools import ToolCall
from ..turns import Turn
from .base import Environment, EnvironmentFailed, Environments
from .wire import (
    CALLS_TO_OPEN,
    EnvironmentFailedRemotely,
    OpenSession,
    OutOfTurn,
    SessionOpened,
    SessionRewards,
    SessionsFull,
    StepTaken,
    TakeStep,
    UnknownSession,
    deadline_s,
)

log = logging.getLogger(__name__)
repeats = Repeats(log)

AnswerT = TypeVar("AnswerT")
_CHECKS_PER_TIMEOUT = 10


@dataclass(frozen=True)
class RowOfRequest:
    """A row of the data set, as a client has sent it."""

    prompt: Any
    columns: Mapping[str, Any]
    token_ids: tuple[int, ...] = ()


@dataclass
class _Session:
    environment: Environment
    owner: str
    last_used_s: float
    steps: int = 0
    """Steps taken."""
    request: str = ""
    """Name of the newest request."""
    task: asyncio.Task[Any] | None = None
    """What answers it."""
    waiting: int = 0
    """Requests that wait for the task."""


class Sessions:
    """Opens, steps and closes sessions. A repeated request gets the answer of the first one."""

    def __init__(
        self,
        environments: Environments,
        *,
        max_sessions: int,
        idle_timeout_s: float,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            idle_timeout_s: how long a session may stay without a request.
            timeout_s: time limit of one call of the project's code, which `environments` enforces. Requests have a
                limit that follows from it.
        """
        self.max_sessions = max_sessions
        self._environments = environments
        self._idle_timeout_s = idle_timeout_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    async def open(self, name: str, request: OpenSession) -> SessionOpened:
        """Begin an episode.

        Raises:
            SessionsFull: there are `max_sessions` already.
            OutOfTurn: the episode has begun.
            BadRequest: the row does not fit the environment.
            EnvironmentFailedRemotely: the environment cannot begin.
        """
        if name not in self._sessions:
            if len(self) >= self.max_sessions:
                raise SessionsFull(
                    f"got a request for a session more than {self.max_sessions}, expected fewer. Fix: add replicas, or "
                    "raise trainer.rollout.environment_server.max_sessions."
                )
            self._sessions[name] = _Session(self._environments.make(), request.owner, self._clock())
        session = self._sessions[name]
        if session.request not in ("", "open"):
            raise OutOfTurn(
                f"got a request to open session {name}, expected step {session.steps}: the episode has begun"
            )

        async def reset() -> SessionOpened:
            start = await session.environment.reset(RowOfRequest(request.prompt, request.columns))
            return SessionOpened(messages=tuple(start.messages), tools=tuple(start.tools))

        return await self._once(name, "open", CALLS_TO_OPEN, reset)

    async def step(self, name: str, number: int, request: TakeStep) -> StepTaken:
        """Answer a turn.

        Raises:
            UnknownSession, OutOfTurn, EnvironmentFailedRemotely: see there.
        """
        session = self._find(name)
        key = f"step {number}"
        if session.request != key and number != session.steps:
            raise OutOfTurn(f"got step {number} of session {name}, expected {session.steps}")
        turn = _turn(request)

        async def step() -> StepTaken:
            taken = await session.environment.step(turn)
            session.steps += 1
            return StepTaken(
                messages=tuple(taken.messages),
                done=taken.done,
                tool_calls=taken.tool_calls,
                tool_errors=taken.tool_errors,
            )

        return await self._once(name, key, len(turn.calls), step)

    async def rewards(self, name: str) -> SessionRewards:
        """Return the environment's own rewards.

        Raises:
            UnknownSession, OutOfTurn, EnvironmentFailedRemotely: see there.
        """
        session = self._find(name)

        async def rewards() -> SessionRewards:
            return SessionRewards(rewards=await session.environment.rewards())

        return await self._once(name, "rewards", 1, rewards)

    async def close(self, name: str, *, failed: bool) -> None:
        """Close a session. What it is doing is cancelled. Nothing happens if there is none.

        Args:
            failed: the environment must not be used for another episode.
        """
        if (session := self._sessions.pop(name, None)) is None:
            return
        try:
            async with asyncio.timeout(deadline_s(self._timeout_s, 1)):
                if session.task is not None and not session.task.done():
                    failed = True
                    session.task.cancel()
                    await asyncio.wait({session.task})
                await session.environment.close(failed=failed)
        except Exception as error:  # the episode is over: nobody can use the answer
            reason = str(error) or type(error).__name__
            repeats.say(logging.WARNING, f"close {reason}", f"session {name} could not be closed: {reason}")

    async def close_of(self, owner: str | None = None) -> None:
        """Close all sessions of an owner. None: of every owner."""
        names = [name for name, session in self._sessions.items() if owner in (None, session.owner)]
        await asyncio.gather(*(self.close(name, failed=True) for name in names))

    async def discard_idle(self) -> None:
        """Close the sessions that have been idle for too long."""
        oldest_s = self._clock() - self._idle_timeout_s
        idle = {n: one for n, one in self._sessions.items() if not one.waiting and one.last_used_s < oldest_s}
        for name, session in idle.items():
            log.warning(
                "session %s of %s is discarded: it had no request for %g s "
                "(trainer.rollout.environment_server.idle_timeout_s)",
                name,
                session.owner,
                self._idle_timeout_s,
            )
        closing = [self.close(name, failed=True) for name in idle]
        await asyncio.gather(*closing)  # at the same time, because one may hang

    async def watch(self) -> None:
        """Discard idle sessions, until cancelled."""
        while True:
            await asyncio.sleep(self._idle_timeout_s / _CHECKS_PER_TIMEOUT)
            await self.discard_idle()

    def _find(self, name: str) -> _Session:
        if session := self._sessions.get(name):
            return session
        raise UnknownSession(
            f"got session {name}, which this server does not have: it was closed, it had no request for "
            f"{self._idle_timeout_s:g} s, or the server has been restarted"
        )

    async def _once(self, name: str, key: str, calls: int, action: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
        """Carry out the request `key` of a session, or wait for the answer of the same request.

        A request that fails closes the session.
        """
        session = self._find(name)
        if session.task is None or session.request != key:
            if session.task is not None and not session.task.done():
                raise OutOfTurn(f"got {key} of session {name} while {session.request} is running")
            session.request = key
            session.task = asyncio.create_task(self._limited(calls, action))
        task = session.task
        session.waiting += 1
        try:
            answer: AnswerT = await asyncio.shield(task)
            return answer
        except asyncio.CancelledError:
            if task.cancelled():
                raise UnknownSession(f"session {name} was closed during {key}") from None
            raise
        except TandemError:
            await self.close(name, failed=True)
            raise
        finally:
            session.waiting -= 1
            session.last_used_s = self._clock()

    async def _limited(self, calls: int, action: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
        limit_s = deadline_s(self._timeout_s, calls)
        try:
            async with asyncio.timeout(limit_s):
                return await action()
        except EnvironmentFailed as error:
            raise EnvironmentFailedRemotely(str(error)) from error
        except UserError as error:
            raise BadRequest(str(error)) from error
        except TimeoutError as error:
            raise EnvironmentFailedRemotely(f"no answer within {limit_s:g} s") from error
        except Exception as error:
            kind = type(error).__name__
            repeats.say(logging.ERROR, kind, f"an environment has failed: {kind}: {error}", traceback=True)
            raise EnvironmentFailedRemotely(f"{type(error).__name__}: {error}") from error


def _turn(request: TakeStep) -> Turn:
    """Return the turn in a request.

    Raises:
        BadRequest: a tool call is not in OpenAI's form.
    """
    try:
        sent = list(request.message.get("tool_calls") or ())
        functions = [call["function"] for call in sent if isinstance(call["id"], str)]
        calls = tuple(ToolCall(str(function["name"]), dict(function["arguments"])) for function in functions)
    except (TypeError, KeyError, ValueError) as error:
        raise BadRequest(
            f"got tool_calls {request.message.get('tool_calls')!r:.200}, expected a list of "
            '{"id": …, "type": "function", "function": {"name": …, "arguments": {…}}}'
        ) from error
    return Turn(request.message, calls, request.problem)
