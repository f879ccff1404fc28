"""Two ranks that compute a group's prompt once learn what they learn without that, also with unequal micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from support.models import make_tiny_model, make_tokenizer
from support.ranks import run_ranks
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner import packed_prompts
from tandem_trainer.learner.learner import Learner

MAX_TOKENS = {"ddp": 48, "fsdp2": 96}
"""Per micro-batch. With `fsdp2`, each one computes its prompts again."""
GROUPS = [{30: [25, 3, 40, 11], 24: [1, 30, 7, 7], 20: [12, 9, 16, 14]}, {6: [5, 2, 4, 9]}]
"""Per rank: length of a prompt → those of its completions."""


def _tokens(size: int, seed: int) -> list[int]:
    return torch.randint(3, 64, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


def _groups(rank: int) -> list[Group]:
    return [
        scored(
            _tokens(prompt, prompt),
            [completion(_tokens(size, prompt + number)) for number, size in enumerate(sizes, 1)],
            [(number * 0.7) % 1.1 for number in range(len(sizes))],
        )
        for prompt, sizes in GROUPS[rank].items()
    ]


def learn(model_dir: Path, out: Path, parallelism: str) -> None:
    """Run on each rank."""
    packed_prompts.SLOWNESS = 0.0  # short prompts are packed, too
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    found: dict[str, Any] = {}
    for shared_prompts in ("never", "auto"):
        split = {
            "max_tokens_per_micro_batch": MAX_TOKENS[parallelism],
            "shared_prompts": shared_prompts,
            "parallelism": parallelism,
        }
        given: dict[str, Any] = {"max_steps": 10, "rewards": [{"function": "rewards:r"}], "learner": split}
        config = TrainerConfig.model_validate(given | {"optim": {"learning_rate": 0.01}, "grpo": {"beta": 0.1}})
        shared = SharedConfig(model=str(model_dir))
        learner = Learner(shared, config, make_tokenizer(), accelerator, needs_reference=True)
        shares = learner.unshared_because is None
        algorithm = Grpo(config)
        batch = algorithm.make_batch(_groups(rank))
        sizes: list[int] = []
        embedding = learner.model.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(inputs[0].numel()))
        stats = [learner.update(batch, algorithm) for _ in range(2)]
        hook.remove()
        parameters = (one.full_tensor() if isinstance(one, DTensor) else one for one in learner.model.parameters())
        torch.save(torch.cat([one.detach().flatten() for one in parameters]), out / f"{shared_prompts}-{rank}.pt")
        found[shared_prompts] = {
            "shares": shares, "tokens": sum(sizes), "stats": stats,
            "micro_batches": len([*batch.micro_batches(MAX_TOKENS[parallelism], shares_prompts=False)]),
        }  # fmt: skip
    if parallelism == "fsdp2":  # in float32, the check at the start is exact
        in_bfloat16 = TrainerConfig.model_validate(given | {"learner": split | {"dtype": "bfloat16"}})
        learner = Learner(shared, in_bfloat16, make_tokenizer(), accelerator, needs_reference=False)
        found["bfloat16"] = {"shares": learner.unshared_because is None}
    (out / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(2, learn, make_tiny_model(folder / "model", initializer_range=0.2), folder, request.param)
    return folder


def test_the_update_is_the_same_on_both_ranks_with_and_without_shared_prompts(out: Path) -> None:
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(one["shares"] for of_rank in found for name, one in of_rank.items() if name != "never")
    for of_rank in found:
        for got, expected in zip(of_rank["auto"]["stats"], of_rank["never"]["stats"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    expected = torch.load(out / "never-0.pt")
    assert torch.equal(torch.load(out / "auto-0.pt"), torch.load(out / "auto-1.pt"))
    # AdamW divides by the gradient's size, which amplifies rounding of tiny gradients.
    assert (torch.load(out / "auto-0.pt") - expected).abs().mean() < 1e-5


def test_one_rank_has_more_rows_and_computes_its_prompts_once(out: Path) -> None:
    large, small = (json.loads((out / f"{rank}.json").read_text()) for rank in range(2))
    assert large["never"]["micro_batches"] > small["never"]["micro_batches"]
    assert large["auto"]["tokens"] < 0.85 * large["never"]["tokens"]
