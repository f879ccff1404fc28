"""With `learner.compile`, a prompt is computed once too, and the update is the same as without both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from support.models import make_tiny_model, make_tokenizer
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.prompt_cache import PromptCache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++"),
]
SIZES = {30: [25, 3, 40, 11], 24: [1, 30, 7, 7]}
"""Length of a prompt → those of its completions."""


def _tokens(size: int, seed: int) -> list[int]:
    return torch.randint(3, 64, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


def _groups() -> list[Group]:
    return [
        scored(
            _tokens(prompt, prompt),
            [completion(_tokens(size, prompt + number)) for number, size in enumerate(sizes, 1)],
            [(number * 0.7) % 1.1 for number in range(len(sizes))],
        )
        for prompt, sizes in SIZES.items()
    ]


def test_same_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(tmp_path / "model", initializer_range=0.2)
    prompts: list[int] = []
    of_rows = PromptCache.of_rows

    def counted(self: PromptCache, prompt_B: torch.Tensor, **options: Any) -> Any:
        prompts.append(len(prompt_B))
        return of_rows(self, prompt_B, **options)

    monkeypatch.setattr(PromptCache, "of_rows", counted)

    def learned(**learner: Any) -> tuple[list[dict[str, float]], torch.Tensor]:
        given = {"max_steps": 10, "rewards": [{"function": "rewards:r"}], "optim": {"learning_rate": 0.01}}
        config = TrainerConfig.model_validate(given | {"learner": {"max_tokens_per_micro_batch": 60} | learner})
        one = Learner(
            SharedConfig(model=str(model)), config, make_tokenizer(), Accelerator(cpu=True), needs_reference=False
        )
        assert ("_compiled_call_impl" in vars(one.model.base_model)) == config.learner.compile
        prompts.clear()  # those of the check at the start
        algorithm = Grpo(config)
        stats = [one.update(algorithm.make_batch(_groups()), algorithm) for _ in range(2)]
        return stats, torch.cat([parameter.detach().flatten() for parameter in one.model.parameters()])

    expected, their_parameters = learned(shared_prompts="never")
    assert not prompts
    got, parameters = learned(compile=True)
    assert prompts
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    # AdamW divides by the gradient's size, which amplifies rounding of tiny gradients.
    assert (parameters - their_parameters).abs().mean() < 1e-5
