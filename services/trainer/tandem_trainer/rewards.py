"""Functions of the user's project that say how good completions are: calling them, and scoring groups with them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import anyio.to_thread
from transformers import PreTrainedTokenizerBase

from tandem_protocol.messages import Group

from .batch import ScoredGroup
from .client import task_group
from .config import RewardConfig
from .errors import UserError
from .functions import CallFailed, check_rewards, describe, load_function
from .prompts import PromptRow
from .sandbox import Sandbox

log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")


class Scorer(Protocol):
    """Says how good the completions of a group are."""

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """All rewards of one group.

        Raises:
            UserError: a function raised or gave something else than was wanted, and errors are not dropped.
        """
        ...


Caller = Callable[[dict[str, Any]], Awaitable[Any]]
"""Calls one function with these arguments, within its deadline."""


class Hung(CallFailed):
    """The function did not answer in time and cannot be ended."""


class ProjectFunction(Generic[AnswerT]):
    """A function of the user's project, whose mistakes are told by its name and the row."""

    def __init__(
        self, kind: str, name: str, call: Caller, check: Callable[[Any, int], AnswerT], *, drop_errors: bool
    ) -> None:
        """
        Args:
            kind: what it is called in messages.
            check: from its answer, and how many values are wanted, to the values; raises `ValueError`.
        """
        self.name = name
        self._kind, self._call, self._check, self._drop_errors = kind, call, check, drop_errors

    async def __call__(self, row: PromptRow, size: int, **arguments: Any) -> AnswerT | None:
        """Its answer to `size` times prompt and columns of the row, and `arguments`; None for a dropped error."""
        columns = {column: [value] * size for column, value in row.columns.items()}
        try:
            answer = await self._call({"prompts": [row.prompt] * size, **arguments, **columns})
            return self._check(answer, size)
        except (Exception, SystemExit) as error:
            message = f"{self._kind} {self.name} on {row.where}: {describe(error)}"
            if self._drop_errors and not isinstance(error, Hung | UserError):
                log.warning("%s; the group is left out of the update (trainer.reward_errors: drop)", message)
                return None
            mend = "" if isinstance(error, Hung) else " Mend the function, or set trainer.reward_errors: drop."
            raise UserError(f"{message}.{mend}") from error


class Rewards:
    """Scores groups with all configured functions."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        tokenizer: PreTrainedTokenizerBase,
        *,
        drop_errors: bool,
        timeout_s: float,
    ) -> None:
        """Load the functions; `timeout_s` is the deadline of a call whose reward has none of its own.

        Raises:
            UserError: a function does not exist, cannot be imported, or is named twice.
        """
        names = [config.function for config in configs]
        if len(set(names)) < len(names):
            raise UserError(f"trainer.rewards names a function twice: {names}; wanted each once")
        turn = asyncio.Lock()
        self._sandboxes: list[Sandbox] = []
        self._functions = [
            ProjectFunction(
                "reward function",
                config.function,
                self._caller(config, config.timeout_s or timeout_s, turn),
                check_rewards,
                drop_errors=drop_errors,
            )
            for config in configs
        ]
        self._weights = [config.weight for config in configs]
        self._tokenizer = tokenizer

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """See Scorer."""
        texts = decode(self._tokenizer, group)
        size, nothing = len(texts), (None,) * len(texts)
        arguments = {
            "completions": as_in_prompt(row, texts),
            "completion_ids": [list(c.token_ids) for c in group.completions],
        }
        async with task_group() as calls:
            tasks = {f.name: calls.create_task(f(row, size, **arguments)) for f in self._functions}
        answers = {name: task.result() for name, task in tasks.items()}
        by_function = {name: nothing if answer is None else answer for name, answer in answers.items()}
        totals = tuple(self._total(column) for column in zip(*by_function.values(), strict=True))
        return scored_group(row, group, texts, nothing if None in answers.values() else totals, by_function)

    async def close(self) -> None:
        """End the sandboxes."""
        for sandbox in self._sandboxes:
            await sandbox.close()

    def _caller(self, config: RewardConfig, timeout_s: float, turn: asyncio.Lock) -> Caller:
        function = load_function("reward function", config.function, config.arguments)
        if not config.sandbox:
            return in_process(function, timeout_s, turn)
        self._sandboxes.append(Sandbox(config.function, config.arguments, timeout_s=timeout_s))
        return self._sandboxes[-1]

    def _total(self, rewards: Sequence[float | None]) -> float | None:
        """Weighted sum of the functions that gave a reward; None if none did."""
        weighted = [w * r for w, r in zip(self._weights, rewards, strict=True) if r is not None]
        return sum(weighted) if weighted else None


def decode(tokenizer: PreTrainedTokenizerBase, group: Group) -> list[str]:
    """The completions without special tokens."""
    return list(tokenizer.batch_decode([c.token_ids for c in group.completions], skip_special_tokens=True))


def as_in_prompt(row: PromptRow, texts: Sequence[str]) -> list[Any]:
    """The completions as functions get them: messages after a conversation, text after text."""
    return list(texts) if isinstance(row.prompt, str) else [[{"role": "assistant", "content": t}] for t in texts]


def scored_group(
    row: PromptRow,
    group: Group,
    texts: Sequence[str],
    rewards: tuple[float | None, ...],
    by_function: dict[str, tuple[float | None, ...]],
) -> ScoredGroup:
    return ScoredGroup(
        row=row.index,
        prompt_ids=row.token_ids,
        prompt_text=row.text,
        texts=tuple(texts),
        group=group,
        rewards=rewards,
        rewards_by_function=by_function,
    )


def in_process(function: Callable[..., Any], timeout_s: float, turn: asyncio.Lock) -> Caller:
    """A caller that runs asynchronous functions concurrently, and synchronous ones in a worker thread.

    Of the latter, one runs at a time of all that share `turn`, so that they need not be thread-safe and do not hold up
    the streams.
    """
    if inspect.iscoroutinefunction(function):
        return functools.partial(_await, function, timeout_s)
    return functools.partial(_run_in_thread, function, timeout_s, turn)


async def _await(function: Callable[..., Awaitable[Any]], timeout_s: float, arguments: dict[str, Any]) -> Any:
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await function(**arguments)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise CallFailed(_late(timeout_s)) from error


async def _run_in_thread(
    function: Callable[..., Any], timeout_s: float, turn: asyncio.Lock, arguments: dict[str, Any]
) -> Any:
    """The deadline leaves out the wait for its turn."""
    async with turn:
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                return await anyio.to_thread.run_sync(lambda: function(**arguments), abandon_on_cancel=True)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise Hung(
                f"{_late(timeout_s)}, and a thread cannot be ended. Give the reward more time, or `sandbox: true`: "
                "a process that is killed at its deadline"
            ) from error


def _late(timeout_s: float) -> str:
    return f"no answer within {timeout_s:g} s (trainer.reward_timeout_s, or the reward's own timeout_s)"
