"""An update on the GPU equals the same update in float32 on the CPU, within what its dtype explains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from support import gpu
from support.gpu_updates import config_of, learner_of, random_groups
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group
from tandem_trainer import algorithms

pytestmark = pytest.mark.gpu

BOUNDS = {"float32": 1e-4, "bfloat16": 0.05}
"""dtype → largest relative difference of loss, gradient norm and gradients, and largest absolute one of logprobs."""
BOUNDS_OF_VESPO = {"float32": 1e-4, "bfloat16": 0.25}
"""VESPO weights a completion by exp of the sum of its tokens' logprob differences. Here these are up to 48 differences
of 0.005 nats in the mean, so their sum is about 0.1 nats and the weight differs by 10 %."""

SGD = {"learning_rate": 1e6, "adam_epsilon": 1e6, "lr_scheduler_type": "constant"}
"""Makes AdamW's first step the gradient itself: m / (√v + ε) × learning rate ≈ m for a large ε. AdamW's usual step
is nearly the gradient's sign, which would turn rounding of tiny gradients into large differences."""

CASES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"grpo": {"loss_type": "grpo"}},
    "gspo": {"grpo": {"loss_type": "grpo", "level": "sequence", "importance_sampling": "sequence_mask"}},
    "dr_grpo": {"grpo": {"loss_type": "dr_grpo"}},
    "cispo": {"grpo": {"loss_type": "cispo", "epsilon_high": 5.0}},
    "sapo": {"grpo": {"loss_type": "sapo"}},
    "vespo": {"grpo": {"loss_type": "vespo"}},
    "luspo": {"grpo": {"loss_type": "luspo"}},
    "dapo with a reference": {"grpo": {"beta": 0.1}},
    "online dpo": {"algorithm": "online_dpo", "rollout": {"num_generations": 2}},
    "dapo with checkpointing": {"learner": {"gradient_checkpointing": True}},
    "dapo in micro-batches": {"learner": {"max_tokens_per_micro_batch": 256}},
    "dapo with LoRA": {"lora": {"r": 8}},
    "online dpo with LoRA and checkpointing": {
        "algorithm": "online_dpo",
        "rollout": {"num_generations": 2},
        "lora": {"r": 8},
        "learner": {"gradient_checkpointing": True},
    },
}


class Update(NamedTuple):
    """One update."""

    metrics: dict[str, float]
    gradient_N: Tensor
    """[N] The change of all trained parameters, on the CPU."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_an_update_on_the_gpu_equals_one_in_float32_on_the_cpu(model_dir: Path, case: str, dtype: str):
    groups = _groups(model_dir, completions=2 if "online dpo" in case else 4)
    expected = _update(model_dir, _config(case, "float32"), groups, cpu=True)
    got = _update(model_dir, _config(case, dtype), groups)
    bound = BOUNDS[dtype]
    bound_of_loss = BOUNDS_OF_VESPO[dtype] if case == "vespo" else bound
    difference = float((got.gradient_N - expected.gradient_N).norm() / expected.gradient_N.norm())
    print(f"{case}, {dtype}: {_differences(got, expected)}, gradient {difference:.1e}")
    # The sampler's logprobs are those of the model in float32 on the CPU.
    assert expected.metrics["mismatch"] < 1e-5
    assert got.metrics["mismatch"] < bound
    assert got.metrics["grad_norm"] == pytest.approx(expected.metrics["grad_norm"], rel=bound)
    # A loss is a sum of positive and negative terms, so its error is relative to the terms.
    assert got.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=bound_of_loss, abs=bound)
    assert difference < bound_of_loss


def _differences(got: Update, expected: Update) -> str:
    names = ("loss", "grad_norm", "mismatch")
    return ", ".join(f"{name} {got.metrics[name]:.6g} ({expected.metrics[name]:.6g})" for name in names)


def _config(case: str, dtype: str) -> TrainerConfig:
    options = CASES[case]
    learner = {"dtype": dtype} | options.get("learner", {})
    return config_of(**options | {"learner": learner, "optim": SGD})


def _groups(model_dir: Path, *, completions: int) -> list[Group]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    @torch.no_grad()
    def logprobs(prompt: list[int], completion: list[int]) -> Sequence[float]:
        ids_BS = torch.tensor([prompt + completion])
        logits_SV = model(input_ids=ids_BS).logits[0, len(prompt) - 1 : -1]
        return logits_SV.log_softmax(-1).gather(-1, ids_BS[0, len(prompt) :, None]).squeeze(-1).tolist()

    return random_groups(
        prompts=4,
        completions=completions,
        prompt_tokens=16,
        completion_tokens=48,
        vocab=model.config.vocab_size,
        ragged=True,
        logprobs=logprobs,
    )


def _update(model_dir: Path, config: TrainerConfig, groups: list[Group], *, cpu: bool = False) -> Update:
    with gpu.accelerator(config, cpu=cpu) as accelerator:
        algorithm = algorithms.load(config, accelerator.device)
        torch.manual_seed(0)  # for the adapter's random weights
        learner = learner_of(model_dir, config, accelerator, reference=algorithm.needs_reference)
        before = _trained(learner.model)
        metrics = learner.update(algorithm.make_batch(groups, list), algorithm)
        return Update(metrics, before - _trained(learner.model))


def _trained(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters() if p.requires_grad])
