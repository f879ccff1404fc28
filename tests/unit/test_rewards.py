"""Reward functions get TRL's arguments, and an invalid result is reported with function and row."""

from __future__ import annotations

import asyncio
import datetime
import math
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.models import make_tokenizer
from support.rollouts import completion, read, rewards_by_name, rewards_of, sequence, trajectory
from tandem_protocol.config.rollout import RewardConfig
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptRow
from tandem_rollout.rewards.scoring import Rewards
from tandem_rollout.trajectory import Trajectory

TOKENIZER = make_tokenizer(80)
COMPLETIONS = [completion([*TOKENIZER("12").input_ids, 2]), completion(TOKENIZER("a").input_ids)]
ROW = PromptRow(7, "prompts.jsonl row 7", "1+2=", "1+2=", tuple(TOKENIZER("1+2=").input_ids), {"answer": 3})
UNSCORED = read(TOKENIZER, ROW, COMPLETIONS)


@pytest.fixture
def project() -> Iterator[types.ModuleType]:
    """A module of the user's project, into which tests write reward functions."""
    module = types.ModuleType("user_rewards")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def _score(
    module: types.ModuleType, row: PromptRow = ROW, *, drop: bool = False, **weights: float
) -> tuple[Trajectory, ...]:
    configs = [RewardConfig(function=f"user_rewards:{name}", weight=weight) for name, weight in weights.items()]
    rewards = Rewards(configs, drop_errors=drop, timeout_s=60)
    return asyncio.run(rewards.score(row, read(TOKENIZER, row, COMPLETIONS)))


def _recording(into: dict[str, Any]) -> Callable[..., list[float]]:
    def reward(**arguments: Any) -> list[float]:
        into.update(arguments)
        return [1.0, 0.0]

    return reward


def test_functions_get_one_text_id_list_and_column_value_per_completion(project: Any):
    seen: dict[str, Any] = {}
    project.reward = _recording(seen)
    scored = _score(project, reward=1.0)
    assert seen == {
        "prompts": ["1+2=", "1+2="],
        "completions": ["12", "a"],
        "completion_ids": [list(c.token_ids) for c in COMPLETIONS],
        "answer": [3, 3],
    }
    assert rewards_of(scored) == (1.0, 0.0)


def test_prompt_and_completion_of_a_conversation_are_lists_of_messages(project: Any):
    seen: dict[str, Any] = {}
    project.reward = _recording(seen)
    conversation = [{"role": "user", "content": "hi"}]
    _score(project, PromptRow(0, "row 0", conversation, "u:hi|a:", (4,), {}), reward=1.0)
    assert seen["prompts"] == [conversation] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": "12"}], [{"role": "assistant", "content": "a"}]]


def test_functions_score_a_whole_episode_and_none_that_failed(project: Any):
    seen: dict[str, Any] = {}
    project.reward = _recording(seen)
    conversation = [{"role": "user", "content": "hi"}]
    row = PromptRow(0, "row 0", conversation, "u:hi|a:", (4,), {})
    turns = [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    done = trajectory([sequence([([4], [5, 6]), ([7, 8], [9])])], messages=(*conversation, *turns), rewards={})
    failed = trajectory([], status="failed", reason="broke", rewards={"Game": 5.0})
    rewards = Rewards([RewardConfig(function="user_rewards:reward", weight=3.0)], drop_errors=False, timeout_s=60)
    own = done.model_copy(update={"rewards": {"Game": 0.25}})
    scored = asyncio.run(rewards.score(row, [done, failed, own]))
    assert seen["completions"] == [turns, turns]
    assert seen["completion_ids"] == [[5, 6, 9]] * 2, "the sampled tokens"
    assert seen["prompts"] == [conversation] * 2
    assert [(one.reward, one.rewards) for one in scored] == [
        (3.0, {"user_rewards:reward": 1.0}),
        (None, {"Game": 5.0}),
        (0.25, {"Game": 0.25, "user_rewards:reward": 0.0}),
    ]
    assert asyncio.run(rewards.score(row, [failed])) == (failed,)


def test_functions_that_take_environments_get_those_of_the_trajectories_that_did_not_fail(project: Any):
    seen: list[Any] = []

    def taking(completions: list[str], environments: list[str], **_: Any) -> list[float]:
        seen.append(environments)
        return [0.0] * len(completions)

    project.taking = taking
    project.none = lambda prompts, completions, completion_ids, answer: [0.0] * len(completions)
    configs = [RewardConfig(function=f"user_rewards:{name}") for name in ("taking", "none")]
    rewards = Rewards(configs, drop_errors=False, timeout_s=60)
    failed = UNSCORED[0].model_copy(update={"status": "failed", "reason": "broke"})
    asyncio.run(rewards.score(ROW, [failed, *UNSCORED], ["a", "b", "c"]))
    assert seen == [["b", "c"]]


def test_a_completion_becomes_an_episode_of_one_turn():
    dated = [{"role": "user", "content": "hi", "at": datetime.date(2026, 1, 2)}]
    row = PromptRow(0, "row 0", dated, "u:hi|a:", (4, 5), {})
    completions = [completion(TOKENIZER("12").input_ids), completion([*TOKENIZER("a").input_ids, 2], finish="length")]
    one, other = read(TOKENIZER, row, completions)
    assert one.prompt == ({"role": "user", "content": "hi", "at": "2026-01-02"},)
    assert one.completion == ({"role": "assistant", "content": "12"},)
    assert other.completion == ({"role": "assistant", "content": "a"},), "special tokens are left out of the text"
    assert [(t.status, t.turns, t.reward, t.rewards) for t in (one, other)] == [
        ("finished", 1, None, {}),
        ("max_tokens", 1, None, {}),
    ]
    assert [t.sequences[0].token_ids[:2] for t in (one, other)] == [(4, 5)] * 2
    assert one.sampled_ids == completions[0].token_ids


def test_weighted_sum_leaves_out_functions_that_return_none(project: Any):
    async def later(completions: list[str], **_: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [0.5, None]

    project.now = lambda **_: torch.tensor([1, 2])
    project.later = later
    scored = _score(project, now=2.0, later=10.0)
    assert rewards_of(scored) == (7.0, 4.0)
    assert rewards_by_name(scored) == {"user_rewards:now": (1.0, 2.0), "user_rewards:later": (0.5, None)}


def test_completion_without_any_reward_has_reward_none(project: Any):
    project.reward = lambda **_: [None, True]
    assert rewards_of(_score(project, reward=1.0)) == (None, 1.0)


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
def test_invalid_result_is_refused_with_function_and_row(project: Any, answer: Any, words: list[str]):
    project.reward = lambda **_: answer
    with pytest.raises(UserError) as error:
        _score(project, reward=1.0)
    assert all(word in str(error.value) for word in ["user_rewards:reward", "prompts.jsonl row 7", *words])


def _raising(**_: Any) -> list[float]:
    raise KeyError("answer")


def test_exception_is_reported_with_function_row_and_line(project: Any):
    project.reward = _raising
    with pytest.raises(UserError) as error:
        _score(project, reward=1.0)
    line = f"{__file__}:{_raising.__code__.co_firstlineno + 1}"
    assert all(word in str(error.value) for word in ["user_rewards:reward", "row 7", "KeyError: 'answer'", line])


def test_failing_function_leaves_the_group_without_reward_if_errors_are_dropped(project: Any):
    project.bad, project.good = _raising, lambda **_: [1.0, 0.0]
    scored = _score(project, drop=True, bad=1.0, good=1.0)
    assert rewards_of(scored) == (None, None)
    assert rewards_by_name(scored)["user_rewards:good"] == (1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", r"No module named 'no_such_module' .*Fix: name a module in the project's folder"),
        ("no_such_package.rewards:f", "Fix: name a module in the project's folder"),
        ("broken_rewards:f", r"broken_rewards\.py:1.*Fix: correct the error in that module\."),
        ("incomplete_rewards:f", r"incomplete_rewards\.py:1.*Fix: correct the error in that module\."),
        ("user_rewards:f", "no function 'f', expected one of: right. Fix: correct the name in config.yaml"),
    ],
)
def test_missing_function_is_reported_at_the_start(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
):
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "incomplete_rewards.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    exec("def right(**_): ...\ndef _helper(): ...\nnumber = 1", project.__dict__)
    with pytest.raises(UserError, match=words):
        Rewards([RewardConfig(function=name)], drop_errors=False, timeout_s=60)


async def test_asynchronous_functions_of_a_group_run_concurrently(project: Any):
    """The functions wait for each other. Called one after the other, neither would finish before its deadline."""
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
    configs = [RewardConfig(function=f"user_rewards:{name}", timeout_s=60) for name in ("one", "two")]
    scored = await Rewards(configs, drop_errors=False, timeout_s=60).score(ROW, UNSCORED)
    assert rewards_of(scored) == (2.0, 0.0)


async def test_waiting_for_another_synchronous_function_does_not_count_for_the_deadline(project: Any):
    inside = threading.Semaphore(1)

    def slow(**_: Any) -> list[float]:
        assert inside.acquire(blocking=False), "two calls run at the same time"
        time.sleep(0.4)
        inside.release()
        return [1.0, 0.0]

    project.one = project.two = slow
    configs = [RewardConfig(function=f"user_rewards:{name}", timeout_s=1) for name in ("one", "two")]
    rewards = Rewards(configs, drop_errors=False, timeout_s=60)
    groups = await asyncio.gather(*(rewards.score(ROW, UNSCORED) for _ in range(2)))
    assert [rewards_of(scored) for scored in groups] == [(2.0, 0.0)] * 2


@pytest.mark.parametrize("drop", [False, True])
def test_late_asynchronous_function_is_reported_with_its_row_or_dropped(project: Any, drop: bool):
    async def late(**_: Any) -> list[float]:
        await asyncio.sleep(60)
        return [1.0, 0.0]

    project.late = late
    rewards = Rewards([RewardConfig(function="user_rewards:late")], drop_errors=drop, timeout_s=0.05)
    if drop:
        assert rewards_of(asyncio.run(rewards.score(ROW, UNSCORED))) == (None, None)
    else:
        with pytest.raises(UserError, match=r"user_rewards:late on prompts.jsonl row 7: no answer within 0\.05 s"):
            asyncio.run(rewards.score(ROW, UNSCORED))


def test_hanging_synchronous_function_ends_the_run_and_suggests_the_sandbox(project: Any):
    """The function cannot be stopped: it would keep running in its thread during the next call."""
    ended = threading.Event()

    def hung(**_: Any) -> list[float]:
        ended.wait(30)
        return [1.0, 0.0]

    project.hung = hung
    config = RewardConfig(function="user_rewards:hung", timeout_s=0.05)
    with pytest.raises(UserError, match=r"user_rewards:hung on .* row 7: no answer within 0\.05 s.*sandbox: true"):
        asyncio.run(Rewards([config], drop_errors=True, timeout_s=60).score(ROW, UNSCORED))
    ended.set()


def test_timeout_error_of_a_function_is_reported_like_its_other_errors(project: Any):
    async def gives_up(**_: Any) -> list[float]:
        raise TimeoutError("the judge is away")

    project.gives_up = gives_up
    with pytest.raises(UserError, match="TimeoutError: the judge is away"):
        _score(project, gives_up=1.0)


def test_arguments_reach_the_function_by_name(project: Any):
    project.longer_than = lambda completions, length, **_: [float(len(text) > length) for text in completions]
    config = RewardConfig(function="user_rewards:longer_than", arguments={"length": 1})
    scored = asyncio.run(Rewards([config], drop_errors=False, timeout_s=60).score(ROW, UNSCORED))
    assert rewards_of(scored) == (1.0, 0.0)
