"""Two and four ranks learn, publish and resume what one process does, however uneven their batches are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from support.models import make_tiny_model, make_tokenizer
from support.ranks import run_ranks
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.batch import ScoredGroup
from tandem_trainer.config import TrainerConfig
from tandem_trainer.learner import Learner
from tandem_trainer.shards import model_table, model_tensors, write_part


def _config(parallelism: str, **grpo: Any) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {
            "max_steps": 10,
            "rewards": [{"function": "rewards:r"}],
            "optim": {"learning_rate": 1e-3},
            "learner": {"parallelism": parallelism, "max_tokens_per_micro_batch": 24},
            "grpo": {"beta": 0.1, "num_iterations": 2} | grpo,
        }
    )


def _groups() -> list[ScoredGroup]:
    """The first is worth more micro-batches than the others together; the last has nothing to learn from."""
    long = [completion([5 + i + j for j in range(12)]) for i in range(4)]
    short = [completion([6, 7, 8]), completion([9]), completion([10, 11]), completion([14, 15])]
    return [
        scored([4, 5] * 4, long, [1.0, 0.0, 0.5, 2.0]),
        scored([7], short, [0.0, 1.0, 1.0, 3.0]),
        scored([8, 9], short[::-1], [0.0, 2.0, 0.0, 1.0]),
        scored([4], short, [None, None, None, None]),
    ]


def _learner(model: Path, parallelism: str) -> tuple[Learner, Grpo, Accelerator]:
    config, accelerator = _config(parallelism), Accelerator(cpu=True)
    shared = SharedConfig(model=str(model))
    learner = Learner(shared, config, make_tokenizer(), accelerator, needs_reference=True)
    return learner, Grpo(config), accelerator


def _publish(learner: Learner, accelerator: Accelerator, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32
    write_part(
        directory,
        model_table(learner.model, dtype),
        model_tensors(learner.model, dtype),
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )


def learn(model: Path, out: Path, parallelisms: list[str]) -> None:
    """What each rank does: publish, learn, keep a checkpoint, learn, resume from it and learn the same again."""
    for parallelism in parallelisms:
        learner, algorithm, accelerator = _learner(model, parallelism)
        rank, ranks, directory = accelerator.process_index, accelerator.num_processes, out / parallelism
        _publish(learner, accelerator, directory / "first")
        batch = algorithm.make_batch(_groups()[rank::ranks])
        # With a forward pass more; later steps would compare the entropies of policies that differ by rounding.
        surest_left_out = Grpo(_config(parallelism, top_entropy_quantile=0.5, num_iterations=1))
        stats = [learner.update(batch, step) for step in (surest_left_out, algorithm, algorithm)]
        learner.save(directory / "checkpoint")
        accelerator.wait_for_everyone()
        stats.append(learner.update(batch, algorithm))
        _publish(learner, accelerator, directory / "last")

        resumed, _, _ = _learner(model, parallelism)
        resumed.load(directory / "checkpoint")
        again = resumed.update(batch, algorithm)
        _publish(resumed, accelerator, directory / "resumed")
        (directory / f"stats-{rank}.json").write_text(json.dumps({"stats": stats, "again": again}))


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.iterdir() for name, tensor in load_file(file).items()}


def _stats(out: Path, rank: int = 0) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads((out / f"stats-{rank}.json").read_text())
    return stats


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("alone")
    learn(model, out, ["fsdp2"])
    return out / "fsdp2"


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("together")
    run_ranks(request.param, learn, model, out, ["ddp", "fsdp2"])
    return out


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_ranks_publish_learn_and_resume_what_one_process_does(
    together: Path, alone: Path, model: Path, parallelism: str
):
    ours, theirs = together / parallelism, alone
    first, start = _tensors(ours / "first"), load_file(model / "model.safetensors")
    assert len(list((ours / "first").iterdir())) == len(list(ours.glob("stats-*.json"))), "each rank wrote its part"
    assert first.keys() == start.keys()
    assert all(torch.equal(first[name], start[name]) for name in start)

    for rank in range(len(list(ours.glob("stats-*.json")))):
        for got, expected in zip(_stats(ours, rank)["stats"], _stats(theirs)["stats"], strict=True):
            assert got["loss"] == pytest.approx(expected["loss"], abs=1e-6)
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in _tensors(theirs / "last").items():
        torch.testing.assert_close(_tensors(ours / "last")[name], tensor, atol=1e-5, rtol=0)
    assert _stats(ours)["again"] == _stats(ours)["stats"][-1]
    resumed, last = _tensors(ours / "resumed"), _tensors(ours / "last")
    assert all(torch.equal(resumed[name], last[name]) for name in last)
