"""Scoring groups with the reward functions of the user's project."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio.to_thread
from transformers import PreTrainedTokenizerBase

from tandem_protocol.messages import Group

from .batch import ScoredGroup
from .client import task_group
from .config import RewardConfig
from .errors import UserError
from .prompts import PromptRow
from .reward_functions import RewardError, check_rewards, describe, load_function
from .sandbox import Sandbox

log = logging.getLogger(__name__)

Caller = Callable[[dict[str, Any]], Awaitable[Any]]
"""Calls a reward function with these arguments, within its deadline."""


class Hung(RewardError):
    """A function did not answer in time and cannot be ended."""


class Rewards:
    """Scores groups with all configured functions.

    Synchronous functions run in a worker thread, one call at a time, so that they need not be thread-safe and do not
    hold up the streams; asynchronous ones run concurrently, sandboxed ones in a process each.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        tokenizer: PreTrainedTokenizerBase,
        *,
        drop_errors: bool,
        timeout_s: float = 300.0,
    ) -> None:
        """Load the functions; `timeout_s` is the deadline of a call whose reward has none of its own.

        Raises:
            UserError: a function does not exist, cannot be imported, or is named twice.
        """
        one_at_a_time = asyncio.Lock()
        self._callers = {config.function: _caller(config, timeout_s, one_at_a_time) for config in configs}
        self._weights = {config.function: config.weight for config in configs}
        if len(self._callers) < len(configs):
            raise UserError(
                f"trainer.rewards names a function twice: {[c.function for c in configs]}; wanted each once"
            )
        self._tokenizer = tokenizer
        self._drop_errors = drop_errors

    async def close(self) -> None:
        """End the sandboxes."""
        for caller in self._callers.values():
            if isinstance(caller, Sandbox):
                await caller.close()

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """All rewards of one group.

        Raises:
            UserError: a function raised or answered something that is no list of rewards, and errors are not dropped.
        """
        texts = self._tokenizer.batch_decode([c.token_ids for c in group.completions], skip_special_tokens=True)
        async with task_group() as calls:
            tasks = {name: calls.create_task(self._call(name, row, group, texts)) for name in self._callers}
        answers = {name: task.result() for name, task in tasks.items()}
        nothing = (None,) * len(texts)
        by_function = {name: nothing if answer is None else answer for name, answer in answers.items()}
        totals = tuple(self._total(column) for column in zip(*by_function.values(), strict=True))
        return ScoredGroup(
            row=row.index,
            prompt_ids=row.token_ids,
            prompt_text=row.text,
            texts=tuple(texts),
            group=group,
            rewards=nothing if None in answers.values() else totals,
            rewards_by_function=by_function,
        )

    def _total(self, rewards: Sequence[float | None]) -> float | None:
        """Weighted sum of the functions that gave a reward; None if none did."""
        weighted = [w * r for w, r in zip(self._weights.values(), rewards, strict=True) if r is not None]
        return sum(weighted) if weighted else None

    async def _call(self, name: str, row: PromptRow, group: Group, texts: list[str]) -> tuple[float | None, ...] | None:
        """The function's rewards; None when it failed and errors are dropped."""
        conversation = not isinstance(row.prompt, str)
        size = len(texts)
        arguments = {
            "prompts": [row.prompt] * size,
            "completions": [[{"role": "assistant", "content": t}] for t in texts] if conversation else texts,
            "completion_ids": [list(c.token_ids) for c in group.completions],
            **{column: [value] * size for column, value in row.columns.items()},
        }
        try:
            return check_rewards(await self._callers[name](arguments), size)
        except (Exception, SystemExit) as error:
            message = f"reward function {name} on {row.where}: {describe(error)}"
            if self._drop_errors and not isinstance(error, Hung | UserError):
                log.warning("%s; the group is left out of the update (trainer.reward_errors: drop)", message)
                return None
            mend = "" if isinstance(error, Hung) else " Mend the function, or set trainer.reward_errors: drop."
            raise UserError(f"{message}.{mend}") from error


def _caller(config: RewardConfig, timeout_s: float, one_at_a_time: asyncio.Lock) -> Caller:
    """Who calls the function of `config`."""
    timeout_s = config.timeout_s or timeout_s
    function = load_function(config.function, config.arguments)
    if config.sandbox:
        return Sandbox(config.function, config.arguments, timeout_s=timeout_s)
    if inspect.iscoroutinefunction(function):
        return functools.partial(_await, function, timeout_s)
    return functools.partial(_run_in_thread, function, timeout_s, one_at_a_time)


async def _await(function: Callable[..., Awaitable[Any]], timeout_s: float, arguments: dict[str, Any]) -> Any:
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await function(**arguments)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise RewardError(_late(timeout_s)) from error


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
