"""Online DPO on episodes of several turns, with a real trainer process and the mock generator."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from support.episode_projects import TOOLS, settings, with_code
from support.models import make_tiny_model, make_tokenizer
from support.projects import Project, assert_same_course, make_projects

VOCAB = 75
JUDGE = '''
import os, signal

calls = 0


def more_said(completions, **_):
    """Prefer the episode in which the policy said more."""
    global calls
    calls += 1
    if str(calls) == os.environ.get("KILL_AT_CALL"):
        os.kill(os.getpid(), signal.SIGKILL)
    said = [[sum(len(m["content"]) for m in one if m["role"] == "assistant") for one in pair] for pair in completions]
    return [None if first == second else int(second > first) for first, second in said]
'''
MORE = [("", "abcdefgi"), ("u:abcd|a:", "byebye hello i"), ("u:byeb|a:", "so")]
LESS = [("", "12b"), ("t:3|a:", "bye")]
"""Episodes: what the policy reads before each turn, and the turn. `12b` is a call of a tool, which answers 3."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab=VOCAB, max_position_embeddings=256)


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Iterator[Any]:
    with make_projects(tmp_path, model) as make_project:

        def made(name: str = "project", options: tuple[str, ...] = (), **trainer: Any) -> Project:
            episodes = settings(environment="episodes:Echo", **TOOLS, num_prompts=4, num_generations=2)
            dpo = {"algorithm": "online_dpo", "rewards": [], "online_dpo": {"judge": "judge:more_said"}}
            project = with_code(make_project(name, options, **episodes, **dpo, **trainer))
            (project.directory / "judge.py").write_text(JUDGE)
            return project

        yield made


def trained(project: Project) -> list[dict[str, Any]]:
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    return project.lines("metrics.jsonl")


def test_a_pair_is_two_whole_episodes_of_a_row_and_the_judged_one_becomes_more_likely(
    make: Any, model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"samples": [[said for _, said in episode] for episode in (MORE, LESS)]}))
    project = make(options=(f"--generator.mock.script={script}",), max_steps=2, log_completions=8)
    first, second = trained(project)
    episodes = [one for one in project.lines("rollouts.jsonl") if one["step"] == 1]
    assert sorted((one["turns"], one["tool_calls"], one["reward"]) for one in episodes) == [
        *[(2, 1, 0.0)] * 4,
        *[(3, 0, 1.0)] * 4,
    ]
    prompts = {one["prompt"] for one in episodes}
    assert len(prompts) == 4
    for name, episode in (("logps/chosen", MORE), ("logps/rejected", LESS)):
        logprobs = [logprob_of(model, f"t:count|u:{prompt}|a:", episode) for prompt in prompts]
        assert first[name] == pytest.approx(sum(logprobs) / 4, rel=1e-5), name
    assert first["loss"] == pytest.approx(math.log(2)), "at first the policy equals the reference"
    assert second["rewards/accuracies"] == 1.0
    assert second["rewards/margins"] > 0


@torch.no_grad()
def logprob_of(model: Path, opening: str, episode: list[tuple[str, str]]) -> float:
    """Return the sum of the logprobs of the sampled tokens of an episode."""
    tokenizer = make_tokenizer(VOCAB)
    ids = tokenizer(opening).input_ids
    sampled: list[Any] = []
    for read, said in episode:
        ids += tokenizer(read).input_ids
        turn = [*tokenizer(said).input_ids, tokenizer.eos_token_id]
        sampled += range(len(ids), len(ids) + len(turn))
        ids += turn
    logits_1TV = LlamaForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits
    logprobs_TV = logits_1TV[0].log_softmax(-1)
    return float(sum(logprobs_TV[place - 1, ids[place]] for place in sampled))


@pytest.mark.thorough
def test_a_killed_run_resumes_bit_for_bit(make: Any) -> None:
    undisturbed, killed = (make(name, max_steps=3, checkpoint={"every_steps": 1}) for name in ("undisturbed", "killed"))
    assert max(line["turns_mean"] for line in trained(undisturbed)) > 1
    assert killed.train(KILL_AT_CALL="10").returncode == -9
    assert killed.steps == [1]
    trained(killed)
    assert_same_course(killed, undisturbed)
