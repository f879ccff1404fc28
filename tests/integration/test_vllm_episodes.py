"""Episodes of several turns with the real vLLM engine: the trainer sees what the generator sampled, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.episode_projects import TOOLS, settings, with_code
from support.generators import running
from support.models import make_tiny_model
from support.projects import Project

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-3
"""Bound of the mean |generator logprob − trainer logprob|, in nats, in float32."""


def test_trainer_and_generator_agree_on_every_sampled_token_of_an_episode(tmp_path: Path) -> None:
    """With peaked distributions, a token at another place would have a very different probability."""
    model = make_tiny_model(tmp_path / "model", vocab=75, initializer_range=0.3, max_position_embeddings=256)
    episodes = settings(environment="episodes:Echo", **TOOLS, max_turn_length=12, max_completion_length=120)
    with running("vllm", model, tmp_path / "weights", log=tmp_path / "generator.log") as generator:
        project = with_code(
            Project(
                tmp_path / "project", model, generator, tmp_path / "weights",
                max_steps=3, log_completions=8, **episodes,
            )
        )  # fmt: skip
        ended = project.train()
    assert ended.returncode == 0, ended.stderr
    for line in project.lines("metrics.jsonl"):
        assert line["turns_mean"] > 2
        assert line["mismatch"] < TOLERANCE
        assert line["kl_sampler"] < TOLERANCE
    assert {message["role"] for one in project.lines("rollouts.jsonl") for message in one["messages"]} == {
        "user", "assistant", "tool",
    }  # fmt: skip
