"""The ready-made rewards, called as the trainer calls them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.models import make_tokenizer
from support.rollouts import completion, read, rewards_of
from tandem_protocol.config.rollout import RewardConfig
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptRow
from tandem_rollout.rewards.ready import exact_match, math_answer, regex_match, soft_overlong_punishment
from tandem_rollout.rewards.scoring import Rewards


def _said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_exact_match_accepts_strings_conversations_and_answers_of_any_type():
    assert exact_match([" 42\n", "42.", "7"], answer=[42, "42", "7 "], prompts=[]) == [1.0, 0.0, 1.0]
    assert exact_match([_said("42"), _said("4")], answer=["42", "42"]) == [1.0, 0.0]


def test_regex_match_must_match_the_complete_text():
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    good = "<think>a\nb</think>\n<answer>4</answer>"
    assert regex_match([good, f"{good} and more", f"well: {good}"], pattern=pattern) == [1.0, 0.0, 0.0]


def test_math_answer_accepts_equal_values_in_any_notation():
    texts = [r"so it is $\boxed{\frac{1}{2}}$", "The answer is 0.5", "$x^2 + 2x + 1$", "43", "no idea"]
    answers = [r"\frac{2}{4}", "1/2", "(x+1)^2", "42", "42"]
    assert math_answer(texts, answer=answers) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_math_answer_is_none_if_the_expected_answer_is_empty():
    assert math_answer(["42"], answer=[""]) == [None]


def test_math_answer_without_the_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"tandem-trainer\[math\]"):
        math_answer(["42"], answer=["42"])


def test_soft_overlong_punishment_equals_the_papers_formula():
    lengths = [0, 8, 9, 10, 12, 20]
    rewards = soft_overlong_punishment([[1] * n for n in lengths], max_completion_length=12, cache_length=4)
    assert rewards == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(UserError, match="cache_length is 13"):
        soft_overlong_punishment([[1]], max_completion_length=12, cache_length=13)


async def test_math_answer_runs_in_a_sandbox_unless_configured_otherwise():
    """In the sandbox's main thread, math-verify gives up on an endless expression. The other reward is unaffected."""
    row = PromptRow(0, "row 0", "p", "p", (4,), {"answer": "42"})
    tokenizer = make_tokenizer(80)
    tokenizer.batch_decode = lambda *_, **__: ["so 42", "$9^{9^{9^9}}$"]  # the tiny tokenizer lacks these characters
    config = RewardConfig(function="tandem_rollout.rewards.ready:math_answer", arguments={"timeout_s": 1})
    rewards = Rewards([config], drop_errors=False, timeout_s=60)
    assert len(rewards._sandboxes) == 1
    scored = await rewards.score(row, read(tokenizer, row, [completion([5]), completion([6])]))
    assert rewards_of(scored) == (1.0, 0.0)
    await rewards.close()
    for sandbox, count in ((False, 0), (True, 1), (None, 1)):
        config = RewardConfig(function="tandem_rollout.rewards.ready:math_answer", sandbox=sandbox)
        assert len(Rewards([config], drop_errors=False, timeout_s=60)._sandboxes) == count


def test_math_answer_works_in_a_thread_too():
    with ThreadPoolExecutor() as pool:
        assert pool.submit(math_answer, ["42", "7"], answer=["42", "42"]).result() == [1.0, 0.0]
