"""A run with two trainer processes: they learn the same as one process, and they stop, resume and fail together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.projects import Project, make_projects
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

FIGURES = ("loss", "grad_norm", "reward_mean", "reward_std", "kl_sampler", "rollout_tokens")


@pytest.fixture(scope="module")
def make_project(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Callable[..., Project]]:
    with make_projects(tmp_path_factory.mktemp("projects"), model) as make:
        yield lambda name, **trainer: make(name, **{"max_steps": 3, "prompts": {"shuffle": False}} | trainer)


def _trained(project: Project, ranks: int, **env: str) -> Project:
    ended = project.train(ranks=ranks, **env)
    assert ended.returncode == 0, ended.stderr
    return project


@pytest.fixture(scope="module")
def alone(make_project: Callable[..., Project]) -> Project:
    return _trained(make_project("alone"), 1)


@pytest.mark.parametrize("parallelism", [pytest.param("ddp", marks=pytest.mark.thorough), "fsdp2"])
def test_two_ranks_learn_the_same_as_one_and_resume_bit_for_bit_after_a_signal_to_one(
    make_project: Callable[..., Project], alone: Project, model: Path, parallelism: str
):
    learner = {"parallelism": parallelism}
    undisturbed = _trained(make_project(f"{parallelism}-undisturbed", learner=learner), 2)
    for ours, theirs in zip(undisturbed.lines("metrics.jsonl"), alone.lines("metrics.jsonl"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        for name in FIGURES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    start = load_file(model / "model.safetensors")
    ours, theirs = undisturbed.parameters(3), alone.parameters(3)
    assert any((theirs[name] - start[name]).abs().max() > 1e-3 for name in start)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    store = WeightStore(undisturbed.directory.parent / "weights")
    manifest, _ = store.read(Version(3, 1))
    assert len(manifest.files) == 2, "each rank wrote one file"
    store.verify(manifest)

    stopped = make_project(f"{parallelism}-stopped", learner=learner)
    ended = stopped.train(ranks=2, ACTION="SIGTERM", AT_CALL="2", AT_RANK="1")
    assert ended.returncode == 143, ended.stderr
    assert stopped.steps == [1, 2]
    _trained(stopped, 2)
    assert stopped.steps == [1, 2, 3]
    assert all(torch.equal(stopped.parameters(3)[name], ours[name]) for name in ours)


def test_a_killed_rank_ends_the_others_and_is_named(make_project: Callable[..., Project]):
    project = make_project("killed")
    began = time.monotonic()
    ended = project.train(ranks=2, ACTION="SIGKILL", AT_CALL="2", AT_RANK="1")
    assert ended.returncode == 137
    assert "ERROR    trainer process 1 was killed by signal 9 (SIGKILL)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - began < 120, "including the start"
