"""Functions of the user's project that say how good completions are: loading, calling, checking what they answer."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import anyio
import anyio.to_thread
from transformers import PreTrainedTokenizerBase

from tandem_protocol.messages import Group

from .batch import ScoredGroup
from .config import RewardConfig
from .errors import UserError
from .prompts import PromptRow

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


class ProjectFunction(Generic[AnswerT]):
    """A function of the user's project, whose mistakes are told by its name and the row.

    Synchronous functions run in a worker thread, one call at a time (`limiter`), so that they need not be thread-safe
    and do not hold up the streams; asynchronous ones run concurrently.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        check: Callable[[Any, int], AnswerT],
        *,
        limiter: anyio.CapacityLimiter,
        drop_errors: bool,
    ) -> None:
        """Load it.

        Args:
            kind: what it is called in messages.
            check: from its answer, and how many values are wanted, to the values; raises `ValueError`.

        Raises:
            UserError: it does not exist or cannot be imported.
        """
        self.name = name
        self._kind, self._check, self._limiter, self._drop_errors = kind, check, limiter, drop_errors
        self._function = load_function(kind, name)

    async def __call__(self, row: PromptRow, size: int, **arguments: Any) -> AnswerT | None:
        """Its answer to `size` times prompt and columns of the row, and `arguments`; None for a dropped error."""
        columns = {column: [value] * size for column, value in row.columns.items()}
        try:
            answer = await self._run({"prompts": [row.prompt] * size, **arguments, **columns})
            return self._check(answer, size)
        except (Exception, SystemExit) as error:
            message = f"{self._kind} {self.name} on {row.where}: {_describe(error)}"
            if self._drop_errors:
                log.warning("%s; the group is left out of the update (trainer.reward_errors: drop)", message)
                return None
            raise UserError(f"{message}. Mend the function, or set trainer.reward_errors: drop.") from error

    async def _run(self, arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(**arguments)
        return await anyio.to_thread.run_sync(
            lambda: self._function(**arguments), abandon_on_cancel=True, limiter=self._limiter
        )


class Rewards:
    """Scores groups with all configured functions."""

    def __init__(
        self, configs: Sequence[RewardConfig], tokenizer: PreTrainedTokenizerBase, *, drop_errors: bool
    ) -> None:
        """Load the functions.

        Raises:
            UserError: a function does not exist, cannot be imported, or is named twice.
        """
        names = [config.function for config in configs]
        if len(set(names)) < len(names):
            raise UserError(f"trainer.rewards names a function twice: {names}; wanted each once")
        limiter = anyio.CapacityLimiter(1)
        self._functions = [
            ProjectFunction("reward function", name, check_rewards, limiter=limiter, drop_errors=drop_errors)
            for name in names
        ]
        self._weights = [config.weight for config in configs]
        self._tokenizer = tokenizer

    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        """See Scorer."""
        texts = decode(self._tokenizer, group)
        size, nothing = len(texts), (None,) * len(texts)
        answers = {
            function.name: await function(
                row,
                size,
                completions=as_in_prompt(row, texts),
                completion_ids=[list(c.token_ids) for c in group.completions],
            )
            for function in self._functions
        }
        by_function = {name: nothing if answer is None else answer for name, answer in answers.items()}
        totals = tuple(self._total(column) for column in zip(*by_function.values(), strict=True))
        return scored_group(row, group, texts, nothing if None in answers.values() else totals, by_function)

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


def load_function(kind: str, name: str) -> Callable[..., Any]:
    """The function that `module:function` names, from the project's folder or anything installed.

    Raises:
        UserError: it cannot be imported or is no function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{kind} {name}: importing {module_name} failed: {_describe(error)}. Wanted a module in the "
            "project's folder (that of config.yaml) or an installed one."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{kind} {name}: module {module_name} has no function {function_name!r}")
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
