"""An evaluation samples from the policy itself, and summarizes the rewards of its groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from support.models import make_tokenizer
from support.rollouts import answer, completion, scored
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.messages import Group, Prompt, RolloutRequest, Sampling
from tandem_protocol.version import Version
from tandem_rollout.completions import CompletionReader
from tandem_rollout.prompts import PromptRow
from tandem_rollout.sampler import Sampler
from tandem_rollout.trajectory import Trajectory
from tandem_trainer.evaluate import Evaluation, evaluation_record, pass_at_k
from tandem_trainer.run.journal import Journal
from tandem_trainer.run.stopping import Stopped


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("rewards", [[1.0, 0.0, None, 2.0, 0.5], [0.0] * 5, [1.0] * 5])
def test_pass_at_k_is_the_fraction_of_draws_of_k_samples_with_a_pass(rewards: list[float | None], k: int):
    draws = [any(reward is not None and reward >= 1 for reward in draw) for draw in combinations(rewards, k)]
    assert pass_at_k(rewards, k) == pytest.approx(fmean(draws))


def test_the_record_has_means_over_all_completions_and_pass_rates_over_prompts():
    pair = [completion([5]), completion([6])]
    groups = [scored([4], pair, [1.0, 0.0]), scored([4], pair, [0.5, None], row=1)]
    assert evaluation_record(groups, ["rewards:r"], [1, 2]) == {
        "n": 2,
        "reward_mean": 0.5,
        "rewards": {"rewards:r": 0.5},
        "pass_at": {"rewards:r": {"1": 0.25, "2": 0.5}},
    }


class Generator:
    """A generator that answers at once, and a scorer that gives every completion 0.25."""

    async def rollouts(self, request: RolloutRequest, on_group: Callable[[Group], object], *, timeout_s: float) -> None:
        self.request = request
        for i in range(len(request.prompts)):
            on_group(answer([completion([5])], i))

    async def score(self, row: PromptRow, trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
        return scored(row.token_ids, [completion([5])], [0.25], row=row.index).trajectories


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


def _evaluation(portal: BlockingPortal, folder: Path, generator: Any, wait: Any = Future.result) -> Evaluation:
    config = TrainerConfig.model_validate(
        {
            "max_steps": 4,
            "rewards": [{"function": "rewards:r"}],
            "rollout": {
                "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3,
                "max_completion_length": 6, "stop_token_ids": [3],
            },
            "eval": {"prompts": {"source": "held_out.jsonl"}},
        }
    )  # fmt: skip
    rows = [PromptRow(i, f"row {i}", str(i), str(i), (i + 1,), {}) for i in range(2)]
    sampler = Sampler(generator, CompletionReader(make_tokenizer()), generator)
    return Evaluation(
        rows=rows, sampler=sampler, win_rate=None, portal=portal, wait=wait, config=config,
        write=Journal(folder, is_main=True).evaluation, is_main=True,
    )  # fmt: skip


def test_an_evaluation_ignores_the_sampling_options_of_training(portal: BlockingPortal, tmp_path: Path):
    generator = Generator()
    record = _evaluation(portal, tmp_path, generator)(Version(3, 1))
    assert generator.request.sampling == Sampling(n=1, max_tokens=6, temperature=0.0, stop_token_ids=(3,))
    assert generator.request.prompts == (Prompt(token_ids=(1,)), Prompt(token_ids=(2,)))
    assert generator.request.min_version == Version(3, 1)
    assert record == {"n": 2, "reward_mean": 0.25, "rewards": {"rewards:r": 0.25}, "pass_at": {"rewards:r": {}}}
    (line,) = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "version": "3.1"} | record


def test_a_stop_request_ends_an_evaluation(portal: BlockingPortal, tmp_path: Path):
    def wait(task: Future[Any]) -> None:
        task.cancel()
        raise Stopped

    with pytest.raises(Stopped):
        _evaluation(portal, tmp_path, Generator(), wait)(Version(3, 1))
    assert not (tmp_path / "eval.jsonl").exists()
