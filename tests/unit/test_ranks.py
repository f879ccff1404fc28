"""Two and four ranks learn, publish and resume like one process, even with uneven batches."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.models import make_tiny_model, make_tokenizer
from support.ranks import run_ranks
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner import shards
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.lora import has_adapter, write_adapter
from tandem_trainer.learner.shards import gather, model_table, model_tensors, write_part


def _config(case: str, **grpo: Any) -> TrainerConfig:
    """The configuration of a case: `ddp` or `fsdp2`, optionally followed by `-lora`."""
    parallelism, _, lora = case.partition("-")
    return TrainerConfig.model_validate(
        {
            "max_steps": 10,
            "rewards": [{"function": "rewards:r"}],
            "optim": {"learning_rate": 1e-3},
            "lora": {"r": 4} if lora else None,
            "learner": {"parallelism": parallelism, "max_tokens_per_micro_batch": 24},
            "grpo": {"beta": 0.1, "num_iterations": 2} | grpo,
        }
    )


def _groups() -> list[Group]:
    """Groups for four ranks. The first needs more micro-batches than all others; the last has no learning signal."""
    long = [completion([5 + i + j for j in range(12)]) for i in range(4)]
    short = [completion([6, 7, 8]), completion([9]), completion([10, 11]), completion([14, 15])]
    return [
        scored([4, 5] * 4, long, [1.0, 0.0, 0.5, 2.0]),
        scored([7], short, [0.0, 1.0, 1.0, 3.0]),
        scored([8, 9], short[::-1], [0.0, 2.0, 0.0, 1.0]),
        scored([4], short, [None, None, None, None]),
    ]


def _learner(model: Path, case: str) -> tuple[Learner, Grpo, Accelerator]:
    config, accelerator = _config(case), Accelerator(cpu=True)
    torch.manual_seed(0)  # for the adapter
    shared = SharedConfig(model=str(model))
    learner = Learner(shared, config, make_tokenizer(), accelerator, needs_reference=True)
    return learner, Grpo(config), accelerator


def _publish(learner: Learner, accelerator: Accelerator, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32
    if has_adapter(learner.model):
        write_adapter(learner.model, directory, dtype, is_main=accelerator.is_main_process)
        return
    gathered: list[weakref.ref[Tensor]] = []

    def counting_gather(tensor: Tensor) -> Tensor:
        result = gather(tensor)
        if isinstance(tensor, DTensor):
            gathered.append(weakref.ref(result))
            assert sum(ref() is not None for ref in gathered) <= 2, "the last tensor may still be written to disk"
        return result

    shards.gather = counting_gather
    write_part(
        directory,
        model_table(learner.model, dtype),
        model_tensors(learner.model, dtype),
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )


def learn(model: Path, out: Path, cases: list[str]) -> None:
    """Run on each rank: publish, learn, save a checkpoint, learn, resume from it and learn the same again."""
    for case in cases:
        learner, algorithm, accelerator = _learner(model, case)
        rank = accelerator.process_index
        ranks = accelerator.num_processes
        assert learner.unshared_because is None
        directory = out / case
        _publish(learner, accelerator, directory / "first")
        batch = algorithm.make_batch(_groups()[rank::ranks])
        # This needs another forward pass. After the first step, entropies would differ by rounding.
        surest_left_out = Grpo(_config(case, top_entropy_quantile=0.5, num_iterations=1))
        stats = [learner.update(batch, step) for step in (surest_left_out, algorithm, algorithm)]
        learner.save(directory / "checkpoint")
        accelerator.wait_for_everyone()
        stats.append(learner.update(batch, algorithm))
        _publish(learner, accelerator, directory / "last")

        resumed, _, _ = _learner(model, case)
        resumed.load(directory / "checkpoint")
        again = resumed.update(batch, algorithm)
        _publish(resumed, accelerator, directory / "resumed")
        (directory / f"stats-{rank}.json").write_text(json.dumps({"stats": stats, "again": again}))


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _stats(out: Path, rank: int = 0) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads((out / f"stats-{rank}.json").read_text())
    return stats


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("alone")
    learn(model, out, ["ddp", "ddp-lora"])
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("two")
    run_ranks(2, learn, model, out, ["ddp", "fsdp2", "ddp-lora", "fsdp2-lora"])
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("four")
    run_ranks(4, learn, model, out, ["ddp", "fsdp2"])
    return out


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "ddp-lora", "fsdp2-lora"])
def test_two_ranks_publish_learn_and_resume_like_one_process(two: Path, alone: Path, case: str):
    _as_one_process(two / case, alone / f"ddp{case.removeprefix('fsdp2').removeprefix('ddp')}", ranks=2)


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_four_ranks_publish_learn_and_resume_like_one_process(four: Path, alone: Path, case: str):
    _as_one_process(four / case, alone / "ddp", ranks=4)


def _as_one_process(ours: Path, theirs: Path, *, ranks: int) -> None:
    first, start = _tensors(ours / "first"), _tensors(theirs / "first")
    is_adapter = ours.name.endswith("lora")
    assert len(list((ours / "first").glob("*.safetensors"))) == (1 if is_adapter else ranks), "each rank wrote its part"
    assert first.keys() == start.keys()
    assert all(torch.equal(first[name], start[name]) for name in start)

    for rank in range(ranks):
        for got, expected in zip(_stats(ours, rank)["stats"], _stats(theirs)["stats"], strict=True):
            assert got["loss"] == pytest.approx(expected["loss"], abs=1e-6)
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    last = _tensors(ours / "last")
    for name, tensor in _tensors(theirs / "last").items():
        torch.testing.assert_close(last[name], tensor, atol=1e-5, rtol=0)
    assert _stats(ours)["again"] == _stats(ours)["stats"][-1]
    resumed = _tensors(ours / "resumed")
    assert all(torch.equal(resumed[name], last[name]) for name in last)
