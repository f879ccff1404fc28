"""Scoring groups with functions of the user's project that say how good completions are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from tandem_protocol.messages import Group

from .batch import ScoredGroup
from .calls import Caller, ProjectFunction, in_process
from .client import task_group
from .config import RewardConfig
from .errors import UserError
from .functions import check_rewards, is_sandboxed, load_function
from .prompts import REWARD_ARGUMENTS, PromptRow
from .sandbox import Sandbox


class Scorer(Protocol):
    """Says how good the completions of a group are."""

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """All rewards of one group.

        Raises:
            UserError: a function raised or gave something else than was wanted, and errors are not dropped.
        """
        ...


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
            raise UserError(f"trainer.rewards names a function twice: {names}, expected each once")
        turn = asyncio.Lock()
        self._sandboxes: list[Sandbox] = []
        self._functions = [
            self._function(config, config.timeout_s or timeout_s, turn, drop_errors=drop_errors) for config in configs
        ]
        self._weights = [config.weight for config in configs]
        self._tokenizer = tokenizer

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """See Scorer."""
        texts = decode(self._tokenizer, group)
        size, nothing = len(texts), (None,) * len(texts)
        async with task_group() as calls:
            tasks = {
                function.name: calls.create_task(
                    function(
                        row,
                        size,
                        completions=as_in_prompt(row, texts),
                        completion_ids=[list(c.token_ids) for c in group.completions],
                    )
                )
                for function in self._functions
            }
        answers = {name: task.result() for name, task in tasks.items()}
        by_function = {name: nothing if answer is None else answer for name, answer in answers.items()}
        totals = tuple(self._total(column) for column in zip(*by_function.values(), strict=True))
        return scored_group(row, group, texts, nothing if None in answers.values() else totals, by_function)

    async def close(self) -> None:
        """End the sandboxes."""
        for sandbox in self._sandboxes:
            await sandbox.close()

    def check_parameters(self, rows: Sequence[PromptRow]) -> None:
        """See that each function can be called with the columns of these rows.

        Raises:
            UserError: one cannot; names the function, the row and the parameter.
        """
        for function in self._functions:
            function.check_parameters(rows, REWARD_ARGUMENTS)

    def _function(
        self, config: RewardConfig, timeout_s: float, turn: asyncio.Lock, *, drop_errors: bool
    ) -> ProjectFunction[tuple[float | None, ...]]:
        kind, name = "reward function", config.function
        function = load_function(kind, name, config.arguments)
        call: Caller = in_process(function, timeout_s, turn)
        if is_sandboxed(function) if config.sandbox is None else config.sandbox:
            call = Sandbox(name, config.arguments, timeout_s=timeout_s)
            self._sandboxes.append(call)
        return ProjectFunction(
            kind, name, function, call, check_rewards, arguments=config.arguments, drop_errors=drop_errors
        )

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
