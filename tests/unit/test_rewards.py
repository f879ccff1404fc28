"""Reward functions get TRL's arguments, and a wrong answer is named with function and row."""

from __future__ import annotations

import asyncio
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from support.models import make_tokenizer
from support.rollouts import completion, group
from tandem_trainer.batch import ScoredGroup
from tandem_trainer.config import RewardConfig
from tandem_trainer.errors import UserError
from tandem_trainer.prompts import PromptRow
from tandem_trainer.rewards import Rewards

TOKENIZER = make_tokenizer(80)
COMPLETIONS = [completion([*TOKENIZER("12").input_ids, 2]), completion(TOKENIZER("a").input_ids)]
ROW = PromptRow(7, "prompts.jsonl row 7", "1+2=", "1+2=", tuple(TOKENIZER("1+2=").input_ids), {"answer": 3})


@pytest.fixture
def project() -> Iterator[types.ModuleType]:
    """A module of the user's that tests put reward functions into."""
    module = types.ModuleType("user_rewards")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def _score(module: types.ModuleType, row: PromptRow = ROW, *, drop: bool = False, **weights: float) -> ScoredGroup:
    configs = [RewardConfig(function=f"user_rewards:{name}", weight=weight) for name, weight in weights.items()]
    return asyncio.run(Rewards(configs, TOKENIZER, drop_errors=drop).score(row, group(COMPLETIONS)))


def _recording(into: dict[str, Any]) -> Callable[..., list[float]]:
    def reward(**arguments: Any) -> list[float]:
        into.update(arguments)
        return [1.0, 0.0]

    return reward


def test_functions_get_texts_ids_and_columns_one_a_completion(project: Any):
    seen: dict[str, Any] = {}
    project.reward = _recording(seen)
    scored = _score(project, reward=1.0)
    assert seen == {
        "prompts": ["1+2=", "1+2="],
        "completions": ["12", "a"],
        "completion_ids": [list(c.token_ids) for c in COMPLETIONS],
        "answer": [3, 3],
    }
    assert scored.rewards == (1.0, 0.0)
    assert scored.texts == ("12", "a")


def test_a_conversation_comes_as_one_and_is_answered_as_one(project: Any):
    seen: dict[str, Any] = {}
    project.reward = _recording(seen)
    conversation = [{"role": "user", "content": "hi"}]
    _score(project, PromptRow(0, "row 0", conversation, "u:hi|a:", (4,), {}), reward=1.0)
    assert seen["prompts"] == [conversation] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": "12"}], [{"role": "assistant", "content": "a"}]]


def test_weighted_sum_of_sync_and_async_functions_without_those_that_abstain(project: Any):
    async def later(completions: list[str], **_: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [0.5, None]

    project.now = lambda **_: torch.tensor([1, 2])
    project.later = later
    scored = _score(project, now=2.0, later=10.0)
    assert scored.rewards == (7.0, 4.0)
    assert scored.rewards_by_function == {"user_rewards:now": (1.0, 2.0), "user_rewards:later": (0.5, None)}


def test_a_row_without_any_reward_has_none(project: Any):
    project.reward = lambda **_: [None, True]
    assert _score(project, reward=1.0).rewards == (None, 1.0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0], ["got 1 rewards", "wanted 2"]),
        (1.0, ["got float"]),
        ([0.0, math.nan], ["nan", "completion 1"]),
        ([math.inf, 0.0], ["inf", "completion 0"]),
        ([0.0, "good"], ["'good'", "completion 1"]),
    ],
)
def test_a_wrong_answer_names_function_and_row(project: Any, answer: Any, words: list[str]):
    project.reward = lambda **_: answer
    with pytest.raises(UserError) as error:
        _score(project, reward=1.0)
    assert all(word in str(error.value) for word in ["user_rewards:reward", "prompts.jsonl row 7", *words])


def _raising(**_: Any) -> list[float]:
    raise KeyError("answer")


def test_an_exception_names_function_row_and_the_line_of_the_function(project: Any):
    project.reward = _raising
    with pytest.raises(UserError) as error:
        _score(project, reward=1.0)
    line = f"{__file__}:{_raising.__code__.co_firstlineno + 1}"
    assert all(word in str(error.value) for word in ["user_rewards:reward", "row 7", "KeyError: 'answer'", line])


def test_with_drop_a_failing_function_leaves_the_whole_row_without_reward(project: Any):
    project.bad, project.good = _raising, lambda **_: [1.0, 0.0]
    scored = _score(project, drop=True, bad=1.0, good=1.0)
    assert scored.rewards == (None, None)
    assert scored.rewards_by_function["user_rewards:good"] == (1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "words"), [("no_such_module:f", "no_such_module"), ("user_rewards:f", "no function 'f'")]
)
def test_a_function_that_is_not_there_is_told_at_the_start(project: Any, name: str, words: str):
    project.__file__ = "rewards.py"
    with pytest.raises(UserError, match=words):
        Rewards([RewardConfig(function=name)], TOKENIZER, drop_errors=False)
