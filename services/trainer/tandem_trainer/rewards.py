"""Reward functions of the user's project: loading, calling, and checking what they answer."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.to_thread
from transformers import PreTrainedTokenizerBase

from tandem_protocol.messages import Group

from .batch import ScoredGroup
from .config import RewardConfig
from .errors import UserError
from .prompts import PromptRow

log = logging.getLogger(__name__)


class Rewards:
    """Scores groups with all configured functions.

    Synchronous functions run in a worker thread, one call at a time, so that they need not be thread-safe and do not
    hold up the streams; asynchronous ones run concurrently.
    """

    def __init__(
        self, configs: Sequence[RewardConfig], tokenizer: PreTrainedTokenizerBase, *, drop_errors: bool
    ) -> None:
        """Load the functions.

        Raises:
            UserError: a function does not exist, cannot be imported, or is named twice.
        """
        self._functions = {config.function: load_function(config.function) for config in configs}
        self._weights = {config.function: config.weight for config in configs}
        if len(self._functions) < len(configs):
            raise UserError(
                f"trainer.rewards names a function twice: {[c.function for c in configs]}; wanted each once"
            )
        self._tokenizer = tokenizer
        self._drop_errors = drop_errors
        self._one_at_a_time = anyio.CapacityLimiter(1)

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """All rewards of one group.

        Raises:
            UserError: a function raised or answered something that is no list of rewards, and errors are not dropped.
        """
        texts = self._tokenizer.batch_decode([c.token_ids for c in group.completions], skip_special_tokens=True)
        answers = {name: await self._call(name, row, group, texts) for name in self._functions}
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
            return check_rewards(await self._run(self._functions[name], arguments), size)
        except (Exception, SystemExit) as error:
            message = f"reward function {name} on {row.where}: {_describe(error)}"
            if self._drop_errors:
                log.warning("%s; the group is left out of the update (trainer.reward_errors: drop)", message)
                return None
            raise UserError(f"{message}. Mend the function, or set trainer.reward_errors: drop.") from error

    async def _run(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(function):
            return await function(**arguments)
        return await anyio.to_thread.run_sync(
            lambda: function(**arguments), abandon_on_cancel=True, limiter=self._one_at_a_time
        )


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names, from the project's folder or anything installed.

    Raises:
        UserError: it cannot be imported or is no function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward function {name}: importing {module_name} failed: {_describe(error)}. Wanted a module in the "
            "project's folder (that of config.yaml) or an installed one."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"reward function {name}: module {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]  # a user's function is typed by its contract only


def check_rewards(answer: Any, size: int) -> tuple[float | None, ...]:
    """The answer of a reward function as floats.

    Raises:
        ValueError: it is not `size` finite numbers or Nones.
    """
    if hasattr(answer, "tolist"):  # an array or a tensor
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        raise ValueError(f"got {type(answer).__name__}; wanted a list of {size} floats, one a completion")
    if len(answer) != size:
        raise ValueError(f"got {len(answer)} rewards; wanted {size}, one a completion")
    for index, reward in enumerate(answer):
        if reward is not None and not (isinstance(reward, numbers.Real) and math.isfinite(reward)):
            raise ValueError(f"got {reward!r} for completion {index}; wanted a finite number, or None for no reward")
    return tuple(None if reward is None else float(reward) for reward in answer)


def _describe(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
