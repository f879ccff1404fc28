"""Record `trl-1.16-online-dpo.json`: results of TRL's own `training_step`. To run it, see `record.py`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer

FILE = Path(__file__).with_name("trl-1.16-online-dpo.json")
PAIRS, TOKENS, EOS = 4, 6, 2
OPTIONS: list[dict[str, Any]] = [
    {"loss_type": loss_type, "beta": beta, "missing_eos_penalty": penalty}
    for loss_type in ("sigmoid", "ipo")
    for beta in (0.1, 0.7)
    for penalty in (None, 0.5)
]


def main() -> None:
    torch.manual_seed(0)
    inputs = random_inputs()
    cases = [trl_step(options, inputs) for options in OPTIONS]
    lines = ",\n".join(json.dumps(case) for case in cases)
    tensors = json.dumps({name: value.tolist() for name, value in inputs.items()})
    source = f"{OnlineDPOTrainer.__name__}.training_step of TRL 1.16.0, float64; rows p and p + {PAIRS} are pair p"
    FILE.write_text(f'{{"source": "{source}", "inputs": {tensors}, "cases": [\n{lines}\n]}}\n')


def random_inputs() -> dict[str, Tensor]:
    """Return eight rows: four end with EOS, four are truncated. Rows p and p + PAIRS are a pair."""
    rows = 2 * PAIRS
    lengths = torch.tensor([3, 6, 4, 6, 6, 2, 6, 5])
    logps = -2 * torch.rand(rows, TOKENS, dtype=torch.float64)
    token_ids = torch.full((rows, TOKENS), 7)
    for row, length in enumerate(lengths.tolist()):
        if length < TOKENS:
            token_ids[row, length - 1] = EOS
    return {
        "logps": logps,
        "ref_logps": logps + 0.5 * torch.randn_like(logps),
        "mask": (torch.arange(TOKENS) < lengths[:, None]).long(),
        "token_ids": token_ids,
        "rewards": torch.randn(rows, dtype=torch.float64),
    }


def trl_step(options: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return TRL's loss, gradient and metrics. The trainer is a stub with only what `training_step` reads."""
    logps = inputs["logps"].clone().requires_grad_()
    model, reference = nn.Identity(), nn.Identity()
    found: dict[str, Any] = {}

    def backward(loss: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, logps)
        found.update(loss=loss.item(), grad_logps=gradient.tolist())

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(backward=backward, gather_for_metrics=lambda value: value),
        args=SimpleNamespace(
            loss_type=options["loss_type"],
            missing_eos_penalty=options["missing_eos_penalty"],
            use_vllm=True,
            torch_empty_cache_steps=None,
            optim="adamw_torch",
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        beta=options["beta"],
        eos_token_ids=[EOS],
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: ["" for _ in ids]),
        ref_model=reference,
        reward_funcs=[None],
        stats=defaultdict(list),
        _calculate_rewards_from_functions=lambda **_: inputs["rewards"].clone(),
        _forward=lambda which, *_: logps if which is model else inputs["ref_logps"],
        _generate_vllm=lambda *_: (None, None, inputs["token_ids"], inputs["mask"]),
    )
    OnlineDPOTrainer.training_step(trainer, model, {"prompt": [""] * PAIRS})
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    return {"options": options, **found, "metrics": {name: trainer.stats[name][0] for name in names}}


if __name__ == "__main__":
    main()
