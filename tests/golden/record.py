"""Record `trl-1.16-losses-random.json`: losses that TRL's own `_compute_loss` returns for random options and inputs.

To run it:

    pip install --no-deps --target DIR trl==1.16.0
    PYTHONPATH=DIR .venv/bin/python tests/golden/record.py
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

FILE = Path(__file__).with_name("trl-1.16-losses-random.json")
CASES = 240
MAX_COMPLETION_LENGTH = 7
CHOICES: dict[str, list[Any]] = {
    "level": ["token", "sequence"],
    "beta": [0.0, 0.04, 0.7],
    "bias_correction_kl": [True, False],
    "epsilon": [0.2, 0.0003, 0.0],
    "epsilon_high": [None, 0.28, 5.0, 0.0004],
    "delta": [None, 1.15, 3.0, 0.8],
    "top_entropy_quantile": [1.0, 0.4, 0.2, 0.0],
    "off_policy_mask": [None, 0.05, 0.5],
    "importance_sampling": ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "clip_max": [3.0, 1.05, 2.0],
    "clip_min": [None, 0.9],
    "sapo_temperature_pos": [1.0, 1.3],
    "sapo_temperature_neg": [1.05, 0.77],
    "vespo_k_pos": [2.0, 1.1],
    "vespo_lambda_pos": [3.0, 2.3],
    "vespo_k_neg": [3.0, 2.7],
    "vespo_lambda_neg": [2.0, 1.9],
}
"""Option → values. The first value is TRL's default; a recorded case contains only the options that differ from it."""


def main() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    inputs = [random_inputs(kind) for kind in ("complete rows", "an empty row", "lost sampler logprobs", "no tokens")]
    cases = [case for index in range(CASES) if (case := record(rng, inputs, index))]
    lines = ",\n".join(json.dumps(case) for case in cases)
    tensors = json.dumps([{name: value.tolist() for name, value in one.items()} for one in inputs])
    head = f'"source": "{GRPOTrainer.__name__}._compute_loss of TRL 1.16.0, float64", "inputs": {tensors}'
    FILE.write_text(f'{{{head}, "max_completion_length": {MAX_COMPLETION_LENGTH}, "cases": [\n{lines}\n]}}\n')


def random_inputs(kind: str) -> dict[str, Tensor]:
    """Return logprobs that differ enough for every clip bound to take effect somewhere; 4 rows of up to 5 tokens."""
    logps = -3 * torch.rand(4, 5, dtype=torch.float64)
    old_logps = logps + 0.4 * torch.randn_like(logps)
    sampler_logps = old_logps + 0.3 * torch.randn_like(logps)
    if kind == "lost sampler logprobs":
        sampler_logps[0, 1] = sampler_logps[2, 0] = math.nan
    lengths = torch.tensor([5, 3, 0 if kind == "an empty row" else 2, 5]) * (kind != "no tokens")
    return {
        "logps": logps,
        "old_logps": old_logps,
        "ref_logps": logps + 0.3 * torch.randn_like(logps),
        "sampler_logps": sampler_logps,
        "mask": (torch.arange(5) < lengths[:, None]).long(),
        "entropy": 3 * torch.rand_like(logps),
        "advantages": torch.tensor([1.1, -0.6, 0.0, -0.3], dtype=torch.float64),
    }


def record(rng: random.Random, inputs: list[dict[str, Tensor]], index: int) -> dict[str, Any] | None:
    loss_type = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")[index % 8]
    options = {name: rng.choice(values) for name, values in CHOICES.items()}
    if loss_type == "vespo" and options["importance_sampling"].startswith("sequence"):
        return None  # TRL refuses this combination
    input_index = rng.choice((0, 0, 1, 2)) if index % 20 else 3
    loss, gradient = trl_loss(loss_type, options, inputs[input_index])
    differing = {name: value for name, value in options.items() if value != CHOICES[name][0]}
    return {"loss_type": loss_type, "options": differing, "input": input_index, "loss": loss, "grad_logps": gradient}


def trl_loss(loss_type: str, options: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[float, list[list[float]]]:
    """Return TRL's loss and gradient. The trainer is a stub with only the attributes that `_compute_loss` reads."""
    logps = inputs["logps"].clone().requires_grad_()
    importance = options["importance_sampling"]
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda value: value,
        pad_across_processes=lambda value, **_: value,
        reduce=lambda value, **_: value,
    )
    trainer = SimpleNamespace(
        accelerator=accelerator,
        args=SimpleNamespace(
            use_bias_correction_kl=options["bias_correction_kl"],
            steps_per_generation=1,
            **{name: value for name, value in options.items() if name.startswith(("delta", "sapo", "vespo"))},
        ),
        aux_loss_enabled=False,
        beta=options["beta"],
        current_gradient_accumulation_steps=1,
        epsilon_low=options["epsilon"],
        epsilon_high=options["epsilon"] if options["epsilon_high"] is None else options["epsilon_high"],
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        importance_sampling_level=options["level"],
        loss_type=loss_type,
        max_completion_length=MAX_COMPLETION_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=options["off_policy_mask"],
        top_entropy_quantile=options["top_entropy_quantile"],
        use_vllm=importance != "none",
        vllm_importance_sampling_correction=importance != "none",
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, inputs["entropy"], None),
        _metrics={"train": defaultdict(list)},
    )
    trainer.get_high_entropy_mask = lambda *arguments: GRPOTrainer.get_high_entropy_mask(trainer, *arguments)
    no_prompt = torch.zeros(len(logps), 1)
    batch = {
        "prompt_ids": no_prompt,
        "prompt_mask": no_prompt,
        "completion_ids": torch.zeros_like(logps),
        "completion_mask": inputs["mask"],
        "advantages": inputs["advantages"],
        "num_items_in_batch": inputs["mask"].sum(),
        "old_per_token_logps": inputs["old_logps"],
        "ref_per_token_logps": inputs["ref_logps"],
        "sampling_per_token_logps": inputs["sampler_logps"],
    }
    if importance != "none":
        batch["importance_sampling_ratio"] = sampling_ratio(options, inputs)
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), gradient.tolist()


def sampling_ratio(options: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    """Return the sampling ratio, with the formula copied from TRL's `_generate_and_score_completions`."""
    difference = ((inputs["old_logps"] - inputs["sampler_logps"]) * inputs["mask"]).nan_to_num(nan=0.0)
    if options["importance_sampling"].startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    low, high = options["clip_min"] or 0.0, options["clip_max"]
    if options["importance_sampling"].endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


if __name__ == "__main__":
    main()
