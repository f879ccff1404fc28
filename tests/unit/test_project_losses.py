"""A loss of the project is called by name, and trains as a built-in loss does, however the batch is split."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from support.models import make_tiny_model, make_tokenizer
from support.project_code import write_module
from support.ranks import run_ranks
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.learning import GrpoConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.version import Version
from tandem_rollout.dispatch import Loads
from tandem_rollout.pool import Counts
from tandem_rollout.trajectory import Group
from tandem_trainer import algorithms
from tandem_trainer.algorithms.base import RECORD_FIELDS, StepTotals
from tandem_trainer.algorithms.grpo import policy_loss
from tandem_trainer.algorithms.online_dpo import pair_loss_of
from tandem_trainer.algorithms.tokens import Pairs, Tokens
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.step_metrics import StepMetrics, update_metrics
from tandem_trainer.run.clock import StepClock
from tandem_trainer.run.metrics import load_fields, samples, step_record

RANDOM = json.loads((Path(__file__).parents[1] / "golden/trl-1.16-losses-random.json").read_text())
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 0}
CPU = torch.device("cpu")
LOSSES = """
    import torch

    def clipped(logprobs_BT, old_logprobs_BT, advantages_BT, options, mask_BT):
        ratio_BT = (logprobs_BT - old_logprobs_BT).exp()
        bounded_BT = ratio_BT.clamp(1 - options.epsilon, 1 + options.upper_epsilon)
        loss_BT = -torch.min(ratio_BT * advantages_BT, bounded_BT * advantages_BT)
        return loss_BT, {"ratio": ratio_BT, "ratio/max": ratio_BT, "rows": 1.0}

    def by_totals(tokens, totals, options):
        loss_BT, _ = clipped(tokens.logprobs_BT, tokens.old_logprobs_BT, tokens.advantages_BT, options, None)
        return loss_BT * totals.tokens / totals.trajectories / tokens.counts_B[:, None]

    def distilled(logprobs_BT, ref_logprobs_BT):
        return (logprobs_BT - ref_logprobs_BT) ** 2

    def scaled(logprobs_BT, advantages_BT, factors):
        return -advantages_BT * logprobs_BT * factors.pop()

    def hinge(logits_P, options, margin=1.0):
        return (margin - options.beta * logits_P).clamp(min=0), {"margin": margin}

    def sigmoid(pairs, options):
        return -torch.nn.functional.logsigmoid(options.beta * pairs.logits_P)
"""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 0.04, "importance_sampling": "token_truncate"},
    {"importance_sampling": "sequence_mask", "off_policy_mask": 0.05, "epsilon_high": 0.3},
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return write_module(tmp_path, monkeypatch, LOSSES)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def _config(**trainer: Any) -> TrainerConfig:
    base = {"max_steps": 9, "rewards": [{"function": "rewards:r"}], "optim": {"learning_rate": 0.01}}
    return TrainerConfig.model_validate(base | trainer)


# -- equal to the built-in losses ------------------------------------------------------------------------------------


def _losses(options: dict[str, Any], inputs: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
    """The loss of a step and its gradient, computed in micro-batches of `rows` rows."""
    tensors = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in inputs.items()
        if name != "max_completion_length"
    }
    totals = StepTotals(len(tensors["mask"]), int(tensors["mask"].sum()), None, RANDOM["max_completion_length"])
    losses: list[Any] = []
    gradients: list[Any] = []
    for start in range(0, len(tensors["mask"]), rows):
        part = {name: value[start : start + rows] for name, value in tensors.items()}
        logprobs_BT = part["logps"].clone().requires_grad_()
        tokens = Tokens(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=part["old_logps"],
            advantages_BT=part["advantages"][:, None],
            mask_BT=part["mask"],
            ref_logprobs_BT=part["ref_logps"],
            sampler_logprobs_BT=part["sampler_logps"],
            entropy_BT=part["entropy"],
        )
        loss, _ = policy_loss(tokens, totals, GrpoConfig.model_validate(options))
        losses.append(loss.detach())
        gradients += torch.autograd.grad(loss, logprobs_BT)
    return torch.stack(losses).sum(), torch.cat(gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("builtin", "function", "reduction"),
    [
        ("dapo", "clipped", None),
        ("grpo", "clipped", "trajectory_mean"),
        ("grpo", "by_totals", None),
        ("dr_grpo", "clipped", "constant_mean"),
        ("luspo", "clipped", "trajectory_sum"),
    ],
)
def test_a_built_in_loss_written_by_the_user_is_equal_in_any_micro_batches(
    module: str, builtin: str, function: str, reduction: str | None, options: dict[str, Any]
) -> None:
    if function == "by_totals":
        options = options | {"beta": 0.0}  # the KL term is averaged by the reduction
    ours = options | {"loss_type": f"{module}:{function}", "reduction": reduction}
    for inputs in RANDOM["inputs"]:
        expected, expected_gradient = _losses(options | {"loss_type": builtin}, inputs, rows=99)
        for rows in (1, 2, 99):
            loss, gradient = _losses(ours, inputs, rows)
            torch.testing.assert_close(loss, expected, **EXACT)
            torch.testing.assert_close(gradient, expected_gradient, **EXACT)


def _groups() -> list[Group]:
    completions = [completion([6, 7, 8]), completion([9]), completion([10, 11, 12, 13, 2]), completion([14, 15])]
    return [
        scored([4, 5], completions, [1.0, 0.0, 0.5, 0.0]),
        scored([5] * 9, completions[::-1], [0.0, 1.0, 1.0, 3.0], row=1),
    ]


def _update(model_dir: Path, config: TrainerConfig) -> tuple[dict[str, float], Tensor]:
    """Make two updates. Returns the metrics of the last, and the parameters."""
    accelerator = Accelerator(cpu=True)
    algorithm = algorithms.load(config, CPU)
    shared = SharedConfig(model=str(model_dir))
    learner = Learner(shared, config, make_tokenizer(), accelerator, needs_reference=algorithm.needs_reference)
    groups = _groups()[accelerator.process_index :: accelerator.num_processes]
    for _ in range(2):
        batch = algorithm.make_batch(groups, gather_object)
        stats = learner.update(batch, algorithm)
    return stats, torch.cat([parameter.detach().flatten() for parameter in learner.model.parameters()])


@pytest.mark.parametrize("max_tokens", [1, 20, 999])
def test_the_users_loss_makes_the_same_update_as_the_built_in_loss(
    module: str, model_dir: Path, max_tokens: int
) -> None:
    learner = {"max_tokens_per_micro_batch": max_tokens}
    grpo = {"num_iterations": 2, "epsilon": 0.02}
    theirs, expected = _update(model_dir, _config(grpo=grpo))
    ours, parameters = _update(model_dir, _config(grpo=grpo | {"loss_type": f"{module}:clipped"}, learner=learner))
    torch.testing.assert_close(parameters, expected, atol=1e-3, rtol=0)
    assert {name: ours[name] for name in ("loss", "grad_norm")} == pytest.approx(
        {name: theirs[name] for name in ("loss", "grad_norm")}, rel=1e-4
    )


def _on_ranks(model_dir: Path, code: Path, name: str, out: Path) -> None:
    sys.path.insert(0, str(code))
    grpo = {"loss_type": f"{name}:clipped", "num_iterations": 2, "epsilon": 0.02}
    stats, parameters = _update(model_dir, _config(grpo=grpo, learner={"max_tokens_per_micro_batch": 20}))
    if Accelerator(cpu=True).is_main_process:
        torch.save((stats, parameters), out / "results.pt")


def test_two_ranks_make_the_same_update_as_one(module: str, model_dir: Path, tmp_path: Path) -> None:
    run_ranks(2, _on_ranks, model_dir, tmp_path, module, tmp_path)
    stats, parameters = torch.load(tmp_path / "results.pt", weights_only=True)
    grpo = {"loss_type": f"{module}:clipped", "num_iterations": 2, "epsilon": 0.02}
    expected, expected_parameters = _update(model_dir, _config(grpo=grpo))
    torch.testing.assert_close(parameters, expected_parameters, atol=1e-3, rtol=0)
    assert stats == pytest.approx(expected, rel=1e-3, abs=1e-6)


# -- what a loss gets and returns ------------------------------------------------------------------------------------


def test_metrics_are_means_over_the_tokens_in_the_loss_or_maxima(module: str, model_dir: Path) -> None:
    grpo = {"loss_type": f"{module}:clipped", "num_iterations": 2}
    stats, _ = _update(model_dir, _config(grpo=grpo, learner={"max_tokens_per_micro_batch": 1}))
    assert stats["ratio"] == pytest.approx(1.0, abs=0.2)
    assert stats["ratio/max"] > stats["ratio"]
    assert stats["rows"] == pytest.approx(1.0)


def test_a_parameter_named_after_the_reference_asks_for_it(module: str, model_dir: Path) -> None:
    config = _config(grpo={"loss_type": f"{module}:distilled", "importance_sampling": "none"})
    assert algorithms.load(config, CPU).needs_reference
    assert not algorithms.load(_config(grpo={"loss_type": f"{module}:clipped"}), CPU).needs_reference
    stats, _ = _update(model_dir, config)
    assert "kl_reference" not in stats, "without beta there is no KL term"
    assert stats["loss"] == pytest.approx(0.0, abs=1e-9), "the policy did not leave the reference"


def test_each_call_gets_its_own_copy_of_the_arguments(module: str) -> None:
    grpo = {"loss_type": f"{module}:scaled", "loss_arguments": {"factors": [2.0]}}
    algorithms.load(_config(grpo=grpo), CPU)  # calls it several times


def test_rows_without_an_advantage_reach_a_loss_of_the_project(module: str) -> None:
    groups = [scored([4], [completion([6]), completion([7]), completion([8])], [0.0, 1.0, 0.5])]
    ours = algorithms.build(_config(grpo={"loss_type": f"{module}:clipped"}))
    builtin = algorithms.build(_config())
    assert len(ours.make_batch(groups, list).starts_B) == 3
    assert len(builtin.make_batch(groups, list).starts_B) == 2


def test_a_loss_over_pairs_is_equal_to_the_built_in_one_and_has_metrics(module: str, model_dir: Path) -> None:
    pairs = Pairs(*torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    dpo = _config(algorithm="online_dpo", rollout={"num_generations": 2}).online_dpo
    ours, _ = pair_loss_of(dpo.model_copy(update={"loss_type": f"{module}:sigmoid"}))(pairs, dpo)
    theirs, _ = pair_loss_of(dpo)(pairs, dpo)
    torch.testing.assert_close(ours, theirs, **EXACT)
    options = {"loss_type": f"{module}:hinge", "loss_arguments": {"margin": 2.0}}
    config = _config(algorithm="online_dpo", rollout={"num_generations": 2}, online_dpo=options)
    algorithm = algorithms.load(config, CPU)
    learner = Learner(
        SharedConfig(model=str(model_dir)), config, make_tokenizer(), Accelerator(cpu=True), needs_reference=True
    )
    groups = [scored([4], [completion([6]), completion([7, 8])], [0.0, 1.0])]
    stats = learner.update(algorithm.make_batch(groups, list), algorithm)
    assert (stats["loss"], stats["margin"]) == pytest.approx((2.0, 2.0)), "at first the policy is the reference"


# -- the rehearsal before the run ------------------------------------------------------------------------------------

BUILT_IN: list[Callable[[int], TrainerConfig]] = [
    lambda size: _config(rollout={"num_generations": size}),
    lambda size: _config(rollout={"num_generations": size}, grpo={"top_entropy_quantile": 0.4, "beta": 0.1}),
    lambda size: _config(rollout={"num_generations": size}, grpo={"loss_type": "vespo", "scale_rewards": "batch"}),
    lambda size: _config(rollout={"num_generations": size}, grpo={"loss_type": "cispo", "epsilon_high": 5.0}),
    lambda size: _config(rollout={"num_generations": size}, grpo={"off_policy_mask": 0.01, "level": "sequence"}),
    lambda _: _config(rollout={"num_generations": 2}, algorithm="online_dpo", online_dpo={"loss_type": "ipo"}),
]


@pytest.mark.parametrize("size", [2, 3, 64])
@pytest.mark.parametrize("config", BUILT_IN)
def test_every_built_in_loss_passes(config: Callable[[int], TrainerConfig], size: int) -> None:
    algorithms.load(config(size), CPU)


def test_the_fields_that_metrics_may_not_take_are_those_of_a_record() -> None:
    stats = update_metrics([StepMetrics(0.0, 0.0, [{}], mismatch=0.0)], learning_rate=1.0)
    given: dict[str, Any] = {"functions": ["rewards:r"], "groups_skipped": 0, "has_episodes": True}
    record = step_record(Version(1, 1), samples(_groups(), 1), stats, **given)
    record |= {"checkpoint_failures": 0, "alerts": {}, "eval": {}} | StepClock().figures(1) | Counts()._asdict()
    record |= load_fields([Loads({"http://generator": 1}, {})])
    assert record.keys() == RECORD_FIELDS
