"""Reward functions get TRL's arguments, and a wrong answer is named with function and row."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
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
    return asyncio.run(Rewards(configs, TOKENIZER, drop_errors=drop, timeout_s=60).score(row, group(COMPLETIONS)))


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
        ([1.0], ["got 1 rewards", "expected 2"]),
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
        Rewards([RewardConfig(function=name)], TOKENIZER, drop_errors=False, timeout_s=60)


async def test_asynchronous_functions_of_a_group_run_at_the_same_time(project: Any):
    """Each waits for the other: one after the other, neither would end before its deadline."""
    here, there = asyncio.Event(), asyncio.Event()

    async def one(**_: Any) -> list[float]:
        here.set()
        await there.wait()
        return [1.0, 0.0]

    async def two(**_: Any) -> list[float]:
        there.set()
        await here.wait()
        return [1.0, 0.0]

    project.one, project.two = one, two
    configs = [RewardConfig(function=f"user_rewards:{name}", timeout_s=10) for name in ("one", "two")]
    scored = await Rewards(configs, TOKENIZER, drop_errors=False, timeout_s=60).score(ROW, group(COMPLETIONS))
    assert scored.rewards == (2.0, 0.0)


async def test_synchronous_functions_take_turns_and_waiting_for_one_is_not_late(project: Any):
    inside = threading.Semaphore(1)

    def slow(**_: Any) -> list[float]:
        assert inside.acquire(blocking=False), "two at a time"
        time.sleep(0.4)
        inside.release()
        return [1.0, 0.0]

    project.one = project.two = slow
    configs = [RewardConfig(function=f"user_rewards:{name}", timeout_s=1) for name in ("one", "two")]
    rewards = Rewards(configs, TOKENIZER, drop_errors=False, timeout_s=60)
    groups = await asyncio.gather(*(rewards.score(ROW, group(COMPLETIONS)) for _ in range(2)))
    assert [scored.rewards for scored in groups] == [(2.0, 0.0)] * 2


@pytest.mark.parametrize("drop", [False, True])
def test_a_late_asynchronous_function_is_named_with_its_row_or_dropped(project: Any, drop: bool):
    async def late(**_: Any) -> list[float]:
        await asyncio.sleep(60)
        return [1.0, 0.0]

    project.late = late
    rewards = Rewards([RewardConfig(function="user_rewards:late")], TOKENIZER, drop_errors=drop, timeout_s=0.05)
    if drop:
        assert asyncio.run(rewards.score(ROW, group(COMPLETIONS))).rewards == (None, None)
    else:
        with pytest.raises(UserError, match=r"user_rewards:late on prompts.jsonl row 7: no answer within 0\.05 s"):
            asyncio.run(rewards.score(ROW, group(COMPLETIONS)))


def test_a_hung_synchronous_function_ends_the_run_even_with_drop_and_names_the_sandbox(project: Any):
    """It would go on in its thread beside the next call."""
    ended = threading.Event()

    def hung(**_: Any) -> list[float]:
        ended.wait(30)
        return [1.0, 0.0]

    project.hung = hung
    config = RewardConfig(function="user_rewards:hung", timeout_s=0.05)
    with pytest.raises(UserError, match=r"user_rewards:hung on .* row 7: no answer within 0\.05 s.*sandbox: true"):
        asyncio.run(Rewards([config], TOKENIZER, drop_errors=True, timeout_s=60).score(ROW, group(COMPLETIONS)))
    ended.set()


def test_a_functions_own_timeout_error_is_told_as_its_own(project: Any):
    async def gives_up(**_: Any) -> list[float]:
        raise TimeoutError("the judge is away")

    project.gives_up = gives_up
    with pytest.raises(UserError, match="TimeoutError: the judge is away"):
        _score(project, gives_up=1.0)


def test_arguments_reach_the_function_by_name(project: Any):
    project.longer_than = lambda completions, length, **_: [float(len(text) > length) for text in completions]
    config = RewardConfig(function="user_rewards:longer_than", arguments={"length": 1})
    scored = asyncio.run(Rewards([config], TOKENIZER, drop_errors=False, timeout_s=60).score(ROW, group(COMPLETIONS)))
    assert scored.rewards == (1.0, 0.0)
