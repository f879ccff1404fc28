"""Learners and batches for tests and measurements on a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoTokenizer

from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.messages import Completion, VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.trajectory import Group, Trajectory
from tandem_rollout.trajectory import Sequence as TokenSequence
from tandem_trainer.learner.learner import Learner

Logprobs = Callable[[list[int], list[int]], Sequence[float]]
"""Prompt and completion → the sampler's logprob of each token of the completion."""


def config_of(**trainer: Any) -> TrainerConfig:
    return TrainerConfig.model_validate({"max_steps": 1000, "rewards": [{"function": "rewards:r"}]} | trainer)


def learner_of(model_dir: Path, config: TrainerConfig, accelerator: Accelerator, *, reference: bool = False) -> Learner:
    shared = SharedConfig(model=str(model_dir))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return Learner(shared, config, tokenizer, accelerator, needs_reference=reference)


def random_groups(
    *,
    prompts: int,
    completions: int,
    prompt_tokens: int,
    completion_tokens: int,
    vocab: int,
    ragged: bool = False,
    logprobs: Logprobs | None = None,
) -> list[Group]:
    """Return groups of random tokens and rewards.

    Args:
        ragged: completions have from 1 to `completion_tokens` tokens, instead of exactly that many.
        logprobs: of the sampler. By default those of a uniform policy, which random weights nearly are.
    """
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(count)]

    groups = []
    for row in range(prompts):
        prompt = tokens(prompt_tokens)
        trajectories = []
        for _ in range(completions):
            completion = tokens(rng.randint(1, completion_tokens) if ragged else completion_tokens)
            sampled = logprobs(prompt, completion) if logprobs else [-1.0] * len(completion)
            trajectories.append(_trajectory(prompt, completion, sampled, rng.random()))
        groups.append(Group(row=row, trajectories=tuple(trajectories)))
    return groups


def _trajectory(prompt: list[int], completion: list[int], logprobs: Sequence[float], reward: float) -> Trajectory:
    one = Completion(
        token_ids=tuple(completion),
        logprobs=tuple(logprobs),
        finish_reason="stop",
        versions=(VersionSpan(version=Version(0, 1), tokens=len(completion)),),
    )
    return Trajectory(
        sequences=(TokenSequence.of_completion(prompt, one),),
        messages=({"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}),
        num_prompt_messages=1,
        reward=reward,
        rewards={"rewards:r": reward},
        status="finished",
        turns=1,
    )
