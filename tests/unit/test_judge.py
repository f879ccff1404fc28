"""A judge compares two completions of a prompt. Its answers become rewards, or win rates against the first policy."""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.models import make_tokenizer
from support.rollouts import completion, read, rewards_by_name, rewards_of
from tandem_protocol.messages import Completion
from tandem_protocol.version import Version
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptRow
from tandem_rollout.rewards.judge import Judge, WinRate
from tandem_rollout.trajectory import Group

TOKENIZER = make_tokenizer(80)
ROW = PromptRow(7, "prompts.jsonl row 7", "1+2=", "1+2=", tuple(TOKENIZER("1+2=").input_ids), {"answer": 3})


@pytest.fixture
def project() -> Iterator[types.ModuleType]:
    """A module of the user's project, to which tests add a judge."""
    module = types.ModuleType("user_judge")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def _judge(*, drop: bool = False) -> Judge:
    return Judge("user_judge:prefer", drop_errors=drop, timeout_s=60)


def _score(*texts: str, row: PromptRow = ROW, drop: bool = False) -> Group:
    completions = [completion(TOKENIZER(text).input_ids) for text in texts]
    trajectories = asyncio.run(_judge(drop=drop).score(row, read(TOKENIZER, row, completions)))
    return Group(row=row.index, trajectories=trajectories)


def _longer(completions: list[list[str]], **_: Any) -> list[int | None]:
    return [None if len(a) == len(b) else int(len(b) > len(a)) for a, b in completions]


def test_a_judge_gets_pairs_with_prompt_and_columns(project: Any):
    seen: dict[str, Any] = {}

    async def prefer(**arguments: Any) -> list[int]:
        seen.update(arguments)
        return [1]

    project.prefer = prefer
    got = _score("12", "a")
    assert seen == {"prompts": ["1+2="], "completions": [["12", "a"]], "answer": [3]}
    assert got.rewards == (0.0, 1.0)
    assert rewards_by_name(got.trajectories) == {"user_judge:prefer": (0.0, 1.0)}
    conversation = [{"role": "user", "content": "hi"}]
    _score("12", "a", row=PromptRow(0, "row 0", conversation, "u:hi|a:", (4,), {}))
    assert seen["prompts"] == [conversation]
    assert seen["completions"] == [[[{"role": "assistant", "content": "12"}], [{"role": "assistant", "content": "a"}]]]


@pytest.mark.parametrize(
    ("answer", "rewards"), [([0], (1.0, 0.0)), ([True], (0.0, 1.0)), ([None], (0.5, 0.5)), ([-1], (0.5, 0.5))]
)
def test_the_preferred_completion_has_the_reward_1(project: Any, answer: Any, rewards: Any):
    project.prefer = lambda **_: answer
    got = _score("12", "a")
    assert got.rewards == rewards
    assert got.has_signal == (rewards != (0.5, 0.5))


@pytest.mark.parametrize("answer", [[2], [0, 1], 0, ["first"], [0.5]])
def test_an_invalid_answer_is_refused_with_the_judge_and_the_row(project: Any, answer: Any):
    project.prefer = lambda **_: answer
    with pytest.raises(UserError, match=r"judge user_judge:prefer on prompts.jsonl row 7: got .*, expected"):
        _score("12", "a")


def test_the_pair_of_a_failing_judge_can_be_dropped(project: Any):
    project.prefer = lambda **_: 1 / 0
    with pytest.raises(UserError, match="ZeroDivisionError"):
        _score("12", "a")
    assert _score("12", "a", drop=True).rewards == (None, None)


def test_a_missing_judge_is_refused_at_the_start(project: Any):
    with pytest.raises(UserError, match="judge user_judge:prefer: module user_judge has no function 'prefer'"):
        _judge()


def _unrated(win_rate: WinRate, row: PromptRow, completions: list[Completion]) -> Group:
    trajectories = asyncio.run(win_rate.score(row, read(TOKENIZER, row, completions)))
    return Group(row=row.index, trajectories=trajectories)


def _rates(file: Path, step: int, *texts: str, samples: int = 1) -> list[float | None]:
    """Return the rewards of rows with `samples` texts each."""
    rows = [PromptRow(i, f"row {i}", "p", "p", (4,), {}) for i in range(len(texts) // samples)]
    win_rate = WinRate(_judge(), rows, file)
    answers = [completion(TOKENIZER(text).input_ids) for text in texts]
    groups = [_unrated(win_rate, row, answers[row.index * samples : (row.index + 1) * samples]) for row in rows]
    rated = asyncio.run(win_rate(groups, Version(step, 1)))
    assert [rewards_by_name(g.trajectories)["user_judge:prefer"] for g in rated] == [
        rewards_of(g.trajectories) for g in rated
    ]
    return [reward for g in rated for reward in rewards_of(g.trajectories)]


def test_every_evaluation_is_compared_with_the_first_policy(project: Any, tmp_path: Path):
    project.prefer = _longer
    file = tmp_path / "first.json"
    assert _rates(file, 0, "1", "12", "123") == [0.5, 0.5, 0.5]
    assert _rates(file, 5, "123", "ab", "") == [1.0, 0.5, 0.0]
    assert _rates(file, 10, "12", "1", "1234") == [1.0, 0.0, 1.0]
    assert _rates(file, 0, "1234", "1", "1") == [0.5, 0.5, 0.5], (
        "a run that starts from step 0 replaces the stored completions"
    )
    assert _rates(file, 5, "123", "12", "12", "new") == [0.0, 1.0, 1.0, None]


def test_after_an_edit_of_the_held_out_prompts_each_is_still_compared_with_its_first_completion(
    project: Any, tmp_path: Path
):
    project.prefer = _longer
    rows = [PromptRow(i, f"row {i}", "p", "p", (4 + i,), {}) for i in range(3)]

    def rates(step: int, rows: list[PromptRow], *texts: str) -> list[float | None]:
        win_rate = WinRate(_judge(), rows, tmp_path / "first.json")
        answers = [[completion(TOKENIZER(text).input_ids)] for text in texts]
        groups = [_unrated(win_rate, *pair) for pair in zip(rows, answers, strict=True)]
        return [
            reward for g in asyncio.run(win_rate(groups, Version(step, 1))) for reward in rewards_of(g.trajectories)
        ]

    assert rates(0, rows, "1", "12", "123") == [0.5, 0.5, 0.5]
    new = PromptRow(0, "row 0", "new", "new", (9,), {})
    shifted = [new, *(PromptRow(row.index + 1, row.where, "p", "p", row.token_ids, {}) for row in rows[1:])]
    assert rates(5, shifted, "12345", "1", "1234") == [None, 0.0, 1.0]


def test_several_samples_of_a_prompt_are_compared_one_by_one(project: Any, tmp_path: Path):
    project.prefer = _longer
    file = tmp_path / "first.json"
    _rates(file, 0, "1", "12", "123", "1", "12", "", samples=3)
    assert _rates(file, 5, "12", "12", "12", "12", "12", "12", samples=3) == [1.0, 0.5, 0.0, 1.0, 0.5, 1.0]


def test_a_judge_that_always_prefers_the_first_completion_finds_no_winner(project: Any, tmp_path: Path):
    project.prefer = lambda completions, **_: [0 for _ in completions]
    file = tmp_path / "first.json"
    _rates(file, 0, "1", "12")
    assert _rates(file, 5, "123", "4") == [0.5, 0.5]


def test_a_pair_of_which_one_failed_is_not_judged(project: Any):
    project.prefer = lambda **_: [0]
    one, other = read(TOKENIZER, ROW, [completion([5]), completion([6])])
    failed = one.model_copy(update={"status": "failed", "reason": "broke"})
    scored = asyncio.run(_judge().score(ROW, [failed, other]))
    assert [(t.reward, t.rewards) for t in scored] == [(None, {"user_judge:prefer": None})] * 2
