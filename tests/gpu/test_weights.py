"""Weights that leave the GPU are the policy's: published, saved, exported to transformers, and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from support import gpu
from support.delta_versions import Replica
from support.gpu_bench_delta import change
from support.gpu_publish import mock_missing, publisher
from support.gpu_updates import config_of, learner_of, random_groups
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.parameters import own_tensors
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.lora import file_name

pytestmark = pytest.mark.gpu

OPTIM = {"learning_rate": 1e-3}
AFTER_RESUME = 1e-3
"""Largest relative difference of an update's metrics after a resume, where kernels sum in no fixed order."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_bytes_are_the_parameters_in_the_published_dtype(model_dir: Path, tmp_path: Path, dtype: str):
    with _trained(model_dir, learner={"dtype": dtype}) as (learner, accelerator):
        published = _publish(learner, model_dir, tmp_path, accelerator)
        expected = {name: tensor.to(getattr(torch, dtype)).cpu() for name, tensor in own_tensors(learner.model).items()}
    _assert_same_bits(published, expected)


def test_deltas_make_the_parameters_from_before_the_update(model_dir: Path, tmp_path: Path):
    """As a generator makes them. The versions are published behind a change of the parameters."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "delta": "always"}
    with (
        _trained(model_dir, learner={"dtype": "bfloat16"}) as (learner, accelerator),
        publisher(learner.model, model_dir, tmp_path, accelerator, **options) as (publish, store),
    ):
        replica = Replica(store, tmp_path / "made")
        for step in range(4):
            expected = {name: tensor.bfloat16().cpu() for name, tensor in own_tensors(learner.model).items()}
            version = publish(learner.model, step, behind=True)
            change(learner.model, step)
            publish.wait()
            manifest, digest = store.read(version)
            assert bool(manifest.delta) == (step > 0)
            files = replica.switch(manifest, digest)
            _assert_same_bits({name: t for file in files for name, t in load_file(file).items()}, expected)


def test_published_adapter_is_the_trained_one(model_dir: Path, tmp_path: Path):
    with _trained(model_dir, learner={"dtype": "bfloat16"}, lora={"r": 8}) as (learner, accelerator):
        published = _publish(learner, model_dir, tmp_path, accelerator)
        state = learner.model.state_dict()
        expected = {file_name(n): t.bfloat16().cpu() for n, t in state.items() if ".lora_" in n}
    _assert_same_bits(published, expected)


def test_the_mock_generator_accepts_what_was_published(model_dir: Path, tmp_path: Path):
    if reason := mock_missing():
        pytest.skip(reason)
    with _trained(model_dir, learner={"dtype": "bfloat16"}) as (learner, accelerator):
        _publish(learner, model_dir, tmp_path, accelerator, mock=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_the_policys_logits_from_published_weights(model_dir: Path, tmp_path: Path, dtype: str):
    with _trained(model_dir, learner={"dtype": dtype}) as (learner, accelerator):
        published = _publish(learner, model_dir, tmp_path, accelerator)
        ours = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).to(accelerator.device)
        ours.load_state_dict(learner.model.state_dict())
        theirs = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).to(accelerator.device)
        theirs.load_state_dict(published, strict=False)  # a tied output embedding is published once
        theirs.tie_weights()
        _assert_same_policy(theirs, ours)


def test_transformers_computes_the_policys_logits_from_a_checkpoint(model_dir: Path, tmp_path: Path):
    with _trained(model_dir, learner={"dtype": "bfloat16"}) as (learner, accelerator):
        learner.save(tmp_path)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).to(accelerator.device)
        _assert_same_policy(saved.eval(), learner.model)


@pytest.mark.parametrize("options", [{}, {"lora": {"r": 8}}], ids=["full", "LoRA"])
def test_a_resumed_learner_has_the_same_bits_and_makes_the_same_update(
    model_dir: Path, tmp_path: Path, options: dict[str, Any]
):
    config = {"learner": {"dtype": "bfloat16"}, **options}
    with _trained(model_dir, **config) as (learner, _):
        learner.save(tmp_path)
        state = _state(learner)
        expected = _update(learner)
    with _new(model_dir, **config) as (resumed, _):
        resumed.load(tmp_path)
        _assert_same_bits(_state(resumed), state)
        assert _update(resumed) == pytest.approx(expected, rel=AFTER_RESUME, abs=1e-5)


def test_a_resumed_learner_continues_bit_for_bit_with_deterministic_kernels(model_dir: Path, tmp_path: Path):
    config = {"learner": {"dtype": "bfloat16"}}
    with _deterministic():
        with _trained(model_dir, **config) as (learner, _):
            learner.save(tmp_path)
            expected = _update(learner)
            state = _state(learner)
        with _new(model_dir, **config) as (resumed, _):
            resumed.load(tmp_path)
            assert _update(resumed) == expected
            _assert_same_bits(_state(resumed), state)


@contextmanager
def _new(model_dir: Path, **options: Any) -> Iterator[tuple[Learner, Any]]:
    config: TrainerConfig = config_of(**{"optim": OPTIM} | options)
    with gpu.accelerator(config) as accelerator:
        torch.manual_seed(0)  # for the adapter's random weights
        yield learner_of(model_dir, config, accelerator), accelerator


@contextmanager
def _trained(model_dir: Path, **options: Any) -> Iterator[tuple[Learner, Any]]:
    with _new(model_dir, **options) as (learner, accelerator):
        for _ in range(2):
            _update(learner)
        yield learner, accelerator


def _update(learner: Learner) -> dict[str, float]:
    algorithm = Grpo(config_of())
    vocab = learner.model.config.vocab_size
    groups = random_groups(prompts=2, completions=4, prompt_tokens=8, completion_tokens=24, vocab=vocab, ragged=True)
    return learner.update(algorithm.make_batch(groups), algorithm)


def _publish(
    learner: Learner, model_dir: Path, folder: Path, accelerator: Any, *, mock: bool = False
) -> dict[str, Tensor]:
    """Publish the policy, and return the tensors of the version's files."""
    dtype = getattr(torch, learner._config.learner.dtype)
    with publisher(learner.model, model_dir, folder, accelerator, dtype=dtype, mock=mock) as (publish, store):
        version = publish(learner.model, 2)
        manifest, _ = store.read(version)
        store.verify(manifest)
        files = [store.directory(version) / entry.name for entry in manifest.files]
        return {k: v for file in files if file.suffix == ".safetensors" for k, v in load_file(file).items()}


def _state(learner: Learner) -> dict[str, Tensor]:
    """All parameters, and the optimizer's moments of those that are trained. On the CPU."""
    optimizer = learner._optimizer.optimizer
    state = {}
    for name, parameter in learner.model.named_parameters():
        state[name] = parameter.detach().cpu().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}: {key}"] = value.detach().cpu().clone()
    return state


def _assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(_bits(got[name]), _bits(tensor)), name


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, in which NaN equals NaN and 0 differs from -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def _assert_same_policy(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """The same logits for random tokens, and the same greedy tokens."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(3, one.config.vocab_size, (4, 32), generator=generator).to(one.device)
    assert torch.equal(one(input_ids=ids_BS).logits, other(input_ids=ids_BS).logits)
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids_BS)}
    assert torch.equal(one.generate(ids_BS, **options), other.generate(ids_BS, **options))


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
