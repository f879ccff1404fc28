"""Score groups of completions with the reward functions of the user's project."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from tandem_protocol.config.rollout import RewardConfig
from tandem_protocol.messages import Group

from ..calls import Caller, ProjectFunction, in_process
from ..client import task_group
from ..errors import UserError
from ..functions import check_rewards, is_sandboxed, load_function
from ..prompts import REWARD_ARGUMENTS, PromptRow
from ..scored_group import ScoredGroup
from .sandbox import Sandbox


class Scorer(Protocol):
    """Gives rewards to the completions of a group."""

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """Score one group.

        Raises:
            UserError: a function raised or returned something invalid, and errors are not dropped.
        """
        ...


class Rewards:
    """Scores groups with all configured reward functions."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        tokenizer: PreTrainedTokenizerBase,
        *,
        drop_errors: bool,
        timeout_s: float,
    ) -> None:
        """Load the functions.

        Args:
            drop_errors: leave out a group when a function fails on it, instead of ending the run.
            timeout_s: time limit of a call, for rewards without their own `timeout_s`.

        Raises:
            UserError: a function does not exist, cannot be imported, or is named twice.
        """
        names = [config.function for config in configs]
        if len(set(names)) < len(names):
            raise UserError(
                f"trainer.rewards names a function twice: got {names}, expected each once. Fix: remove one."
            )
        turn = asyncio.Lock()
        self._sandboxes: list[Sandbox] = []
        self._functions = [
            self._function(config, config.timeout_s or timeout_s, turn, drop_errors=drop_errors) for config in configs
        ]
        self._weights = [config.weight for config in configs]
        self._tokenizer = tokenizer

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """Score one group with all functions at the same time. See `Scorer`."""
        texts = decode(self._tokenizer, group)
        size = len(texts)
        no_rewards = (None,) * size
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
        results = {name: task.result() for name, task in tasks.items()}
        by_function = {name: no_rewards if result is None else result for name, result in results.items()}
        if None in results.values():  # a failed function leaves the group without a total reward
            return scored_group(row, group, texts, no_rewards, by_function)
        totals = tuple(self._total(column) for column in zip(*by_function.values(), strict=True))
        return scored_group(row, group, texts, totals, by_function)

    async def close(self) -> None:
        """Stop the sandboxes."""
        for sandbox in self._sandboxes:
            await sandbox.close()

    def check_parameters(self, rows: Sequence[PromptRow]) -> None:
        """Check that each function can be called with the columns of these rows.

        Raises:
            UserError: a function cannot be called. The message names the function, the row and the parameter.
        """
        for function in self._functions:
            function.check_parameters(rows, REWARD_ARGUMENTS)

    def _function(
        self, config: RewardConfig, timeout_s: float, turn: asyncio.Lock, *, drop_errors: bool
    ) -> ProjectFunction[tuple[float | None, ...]]:
        kind = "reward function"
        name = config.function
        function = load_function(kind, name, config.arguments)
        call: Caller = in_process(function, timeout_s, turn)
        needs_sandbox = is_sandboxed(function) if config.sandbox is None else config.sandbox
        if needs_sandbox:
            call = Sandbox(name, config.arguments, timeout_s=timeout_s)
            self._sandboxes.append(call)
        return ProjectFunction(
            kind, name, function, call, check_rewards, arguments=config.arguments, drop_errors=drop_errors
        )

    def _total(self, rewards: Sequence[float | None]) -> float | None:
        """Weighted sum of the rewards that are not None; None if all of them are."""
        weighted = [w * r for w, r in zip(self._weights, rewards, strict=True) if r is not None]
        return sum(weighted) if weighted else None


def decode(tokenizer: PreTrainedTokenizerBase, group: Group) -> list[str]:
    """Decode the completions of a group, without special tokens."""
    return list(tokenizer.batch_decode([c.token_ids for c in group.completions], skip_special_tokens=True))


def as_in_prompt(row: PromptRow, texts: Sequence[str]) -> list[Any]:
    """The completions as functions get them: strings if the prompt is a string, else lists with one message."""
    if isinstance(row.prompt, str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def scored_group(
    row: PromptRow,
    group: Group,
    texts: Sequence[str],
    rewards: tuple[float | None, ...],
    by_function: dict[str, tuple[float | None, ...]],
) -> ScoredGroup:
    """Combine a group, its prompt and its rewards."""
    return ScoredGroup(
        row=row.index,
        prompt_ids=row.token_ids,
        prompt_text=row.text,
        texts=tuple(texts),
        group=group,
        rewards=rewards,
        rewards_by_function=by_function,
    )
