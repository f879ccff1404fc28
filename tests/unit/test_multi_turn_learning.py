"""Episodes of several turns: gradients equal those of an independent computation, which knows only full logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from support.models import make_tiny_model
from support.rollouts import sequence, trajectory
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group, Sequence, Span, Trajectory
from tandem_trainer import algorithms
from tandem_trainer.algorithms.base import Algorithm, StepTotals
from tandem_trainer.batch import Batch
from tandem_trainer.learner.logprobs import TokenLogprobs

WITH_TOOL = sequence([([4, 5], [6, 7]), ([20, 21, 22], [8, 9, 10])])
REWRITTEN = (sequence([([4, 5], [11, 12, 13])]), sequence([([4, 5, 23], [14]), ([24], [15, 16])]))
SHORT = sequence([([4, 5, 6], [17])])
TRAJECTORIES = (trajectory([WITH_TOOL], 1.0), trajectory(REWRITTEN, 0.0), trajectory([SHORT], 2.5))
GROUP = Group(row=0, trajectories=TRAJECTORIES)
ADVANTAGES = (1.0 - 3.5 / 3, -3.5 / 3, 2.5 - 3.5 / 3)
TRAJECTORY_COUNT, TOKEN_COUNT, LONGEST = 3, 12, 20
EXACT: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM.from_pretrained(make_tiny_model(tmp_path_factory.mktemp("model"))).double()


def _algorithm(**options: Any) -> Algorithm:
    return algorithms.build(
        TrainerConfig.model_validate({"max_steps": 1, "rewards": [{"function": "rewards:r"}]} | options)
    )


def _grpo(**options: Any) -> Algorithm:
    return _algorithm(grpo={"importance_sampling": "none", "scale_rewards": "none"} | options)


def _gradient(
    model: PreTrainedModel, algorithm: Algorithm, batch: Batch, max_tokens: int, drift: float = 0.0
) -> list[Tensor]:
    """The sum of the micro-batches' gradients.

    The reference is the model itself. Since the old policy, the logprob of token i has grown by `drift` · i.
    """
    policy = TokenLogprobs(model, temperature=1.0, chunk_size=5)
    totals = StepTotals(batch.trajectory_total, batch.token_total, max_completion_length=LONGEST)
    model.zero_grad()
    for micro_batch in batch.micro_batches(max_tokens):
        logprobs_BT, entropy_BT = policy(*micro_batch.model_inputs)
        fixed_BT = logprobs_BT.detach()
        positions_BT = micro_batch.starts_B[:, None] + torch.arange(fixed_BT.shape[1])
        ids_BT = micro_batch.token_ids_BS.gather(1, positions_BT.clamp(max=micro_batch.token_ids_BS.shape[1] - 1))
        loss = algorithm.loss(
            logprobs_BT,
            micro_batch,
            totals,
            entropy_BT=entropy_BT,
            old_logprobs_BT=fixed_BT - drift * ids_BT,
            ref_logprobs_BT=fixed_BT,
        )
        loss.loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _sampled_logprobs(model: PreTrainedModel, one: Sequence) -> Tensor:
    """Logprobs of the sampled tokens of one sequence, from full logits."""
    token_ids = torch.tensor([one.token_ids])
    logprobs_SV = model(input_ids=token_ids).logits[0].log_softmax(-1)
    positions = [position for span in one.sampled for position in range(span.start, span.end)]
    return torch.stack([logprobs_SV[position - 1, one.token_ids[position]] for position in positions])


def _assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def _of_loss(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


WEIGHTS = {
    "grpo": lambda tokens: 1 / tokens / TRAJECTORY_COUNT,
    "dapo": lambda _: 1 / TOKEN_COUNT,
    "dr_grpo": lambda _: 1 / (TRAJECTORY_COUNT * LONGEST),
    "luspo": lambda _: 1 / TRAJECTORY_COUNT,
}
"""Loss type → the weight of a token in a trajectory with this number of sampled tokens."""


@pytest.mark.parametrize("max_tokens", [1, 16, 1000])
@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_grpos_gradient_equals_that_of_the_full_logits(model: PreTrainedModel, loss_type: str, max_tokens: int):
    """At ratio 1, the gradient of every clipped loss is that of −weight · advantage · logprob."""
    algorithm = _grpo(loss_type=loss_type)
    batch = algorithm.make_batch([GROUP], list)
    assert (batch.trajectory_total, batch.token_total) == (TRAJECTORY_COUNT, TOKEN_COUNT)
    got = _gradient(model, algorithm, batch, max_tokens)
    expected = torch.zeros((), dtype=torch.float64)
    for one, advantage in zip(TRAJECTORIES, ADVANTAGES, strict=True):
        weight = WEIGHTS[loss_type](one.num_sampled)
        for part in one.sequences:
            expected = expected - weight * advantage * _sampled_logprobs(model, part).sum()
    _assert_equal(got, _of_loss(model, expected))


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 6, 7])
def test_each_entry_of_the_mask_changes_the_gradient(model: PreTrainedModel, place: int):
    """A tool's token that counted as sampled would be trained, and a sampled one that did not would not be."""
    algorithm = _grpo(loss_type="dapo")
    batch = algorithm.make_batch([GROUP], list)
    right = [part.clone() for part in _gradient(model, algorithm, batch, 1000)]
    masks = {name: getattr(batch, name).clone() for name in ("sampled_mask_BT", "mask_BT")}
    for mask_BT in masks.values():
        mask_BT[0, place] = 1 - int(mask_BT[0, place])
    wrong = _gradient(model, algorithm, replace(batch, **masks), 1000)
    assert batch.sampled_mask_BT[0].tolist() == [True, True, False, False, False, True, True, True]
    assert max(float((a - b).abs().max()) for a, b in zip(right, wrong, strict=True)) > 1e-4


@pytest.mark.parametrize("max_tokens", [1, 1000])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_the_samplers_correction_covers_exactly_the_sampled_tokens(model: PreTrainedModel, kind: str, max_tokens: int):
    """`sequence` is the product over one sequence, of which a trajectory may have several."""
    algorithm = _grpo(loss_type="dapo", importance_sampling=f"{kind}_truncate", clip_max=3.0)
    got = _gradient(model, algorithm, algorithm.make_batch([GROUP], list), max_tokens)
    expected = torch.zeros((), dtype=torch.float64)
    for one, advantage in zip(TRAJECTORIES, ADVANTAGES, strict=True):
        for part in one.sequences:
            logprobs = _sampled_logprobs(model, part)
            sampler = torch.tensor(
                [value for value, is_sampled in zip(part.logprobs, part.mask, strict=True) if is_sampled]
            )
            log_ratio = logprobs.detach() - sampler
            factor = (log_ratio if kind == "token" else log_ratio.sum()).exp().clamp(max=3.0)
            expected = expected - (advantage * factor * logprobs).sum() / TOKEN_COUNT
    _assert_equal(got, _of_loss(model, expected))


@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_gspos_ratio_is_the_geometric_mean_over_the_sampled_tokens_of_a_sequence(
    model: PreTrainedModel, max_tokens: int
):
    drift = 0.01
    algorithm = _grpo(loss_type="grpo", level="sequence")
    got = _gradient(model, algorithm, algorithm.make_batch([GROUP], list), max_tokens, drift)
    expected = torch.zeros((), dtype=torch.float64)
    for one, advantage in zip(TRAJECTORIES, ADVANTAGES, strict=True):
        for part in one.sequences:
            logprobs = _sampled_logprobs(model, part)
            ratio = (logprobs - logprobs.detach() + drift * torch.tensor(part.sampled_ids)).mean().exp()
            share = part.num_sampled / one.num_sampled
            expected = expected - advantage * ratio * share / TRAJECTORY_COUNT
    _assert_equal(got, _of_loss(model, expected))


def _with_flipped_mask(one: Sequence, position: int) -> Sequence:
    """Claim that the policy sampled the token at `position` too."""
    return Sequence(
        token_ids=one.token_ids,
        sampled=tuple(sorted([*one.sampled, Span(start=position, end=position + 1)], key=lambda span: span.start)),
        logprobs=one.logprobs,
        versions=(one.versions[0].model_copy(update={"tokens": one.num_sampled + 1}),),
    )


@pytest.mark.parametrize("position", [4, 5, 6])
@pytest.mark.parametrize("options", [{}, {"algorithm": "online_dpo", "rollout": {"num_generations": 2}}], ids=str)
def test_a_tool_token_in_the_mask_changes_the_gradient(model: PreTrainedModel, position: int, options: dict[str, Any]):
    algorithm = _algorithm(**options)

    def gradient(one: Sequence) -> list[Tensor]:
        group = Group(row=0, trajectories=(trajectory([one], 1.0), TRAJECTORIES[1]))
        return [part.clone() for part in _gradient(model, algorithm, algorithm.make_batch([group], list), 1000)]

    right, wrong = gradient(WITH_TOOL), gradient(_with_flipped_mask(WITH_TOOL, position))
    assert max(float((a - b).abs().max()) for a, b in zip(right, wrong, strict=True)) > 1e-3


@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_dpo_compares_the_sums_over_all_sequences_of_two_trajectories(model: PreTrainedModel, max_tokens: int):
    algorithm = _algorithm(algorithm="online_dpo", rollout={"num_generations": 2}, online_dpo={"beta": 0.5})
    groups = [
        Group(row=0, trajectories=(TRAJECTORIES[1], TRAJECTORIES[0])),
        Group(row=1, trajectories=(TRAJECTORIES[2], TRAJECTORIES[1])),
    ]
    batch = algorithm.make_batch(groups, list)
    assert (batch.trajectory_total, batch.token_total) == (2, 5 + 6 + 6 + 1)
    got = _gradient(model, algorithm, batch, max_tokens)

    def total(one: Trajectory) -> Tensor:
        return torch.cat([_sampled_logprobs(model, part) for part in one.sequences]).sum()

    expected = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in ((TRAJECTORIES[0], TRAJECTORIES[1]), (TRAJECTORIES[2], TRAJECTORIES[1])):
        margin = total(chosen) - total(rejected)
        expected = expected - torch.nn.functional.logsigmoid(0.5 * (margin - margin.detach())) / 2
    _assert_equal(got, _of_loss(model, expected))


LOSSES = [
    {"loss_type": "grpo", "level": "sequence"},
    {"loss_type": "sapo"},
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "vespo", "importance_sampling": "token_truncate"},
    {"loss_type": "luspo", "off_policy_mask": 0.01, "beta": 0.1},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_the_gradient_does_not_depend_on_how_a_trajectory_is_split(model: PreTrainedModel, options: dict[str, Any]):
    algorithm = _grpo(**options)
    batch = algorithm.make_batch([GROUP], list)
    expected = [part.clone() for part in _gradient(model, algorithm, batch, 1000, 0.01)]
    assert len(list(batch.micro_batches(1))) == 4
    _assert_equal(_gradient(model, algorithm, batch, 1, 0.01), expected)


def test_a_failed_trajectory_changes_neither_the_baseline_nor_the_totals():
    failed = trajectory([SHORT], 7.0, status="failed", reason="the environment died")
    algorithm = _grpo(scale_rewards="group")
    without = algorithm.make_batch([GROUP], list)
    among = algorithm.make_batch([Group(row=0, trajectories=(failed, *TRAJECTORIES))], list)
    for name, value in vars(without).items():
        other = getattr(among, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


@pytest.mark.parametrize("options", [{}, {"algorithm": "online_dpo", "rollout": {"num_generations": 2}}], ids=str)
def test_a_batch_of_failed_trajectories_has_no_signal(options: dict[str, Any]):
    failed = trajectory([], status="failed", reason="the environment died")
    batch = _algorithm(**options).make_batch([Group(row=0, trajectories=(failed, failed))], list)
    assert not batch.has_signal
    assert (batch.trajectory_total, batch.token_total) == (0, 0)
    assert not any(micro_batch.mask_BT.any() for micro_batch in batch.micro_batches(8))


def test_an_episode_that_a_limit_ended_can_be_left_out_of_the_loss():
    for status in ("max_tokens", "max_turns"):
        cut_off = trajectory([WITH_TOOL], 1.0, status=status)
        group = Group(row=0, trajectories=(cut_off, *TRAJECTORIES[1:]))
        batch = _grpo(mask_truncated_completions=True).make_batch([group], list)
        assert batch.trajectory_tokens_B.tolist() == [6, 6, 1]
        assert (batch.trajectory_total, batch.token_total) == (3, 7)


def test_an_environments_own_reward_is_an_objective_of_its_own():
    own = [
        one.model_copy(update={"rewards": {"rewards:r": float(i), "Game": value}})
        for i, (one, value) in enumerate(zip(TRAJECTORIES, (5.0, 1.0, 1.0), strict=True))
    ]
    group = Group(row=0, trajectories=tuple(own))
    batch = _grpo(multi_objective_aggregation="normalize_then_sum").make_batch([group], list)
    advantages = dict(zip(batch.trajectory_tokens_B.tolist(), batch.advantages_B.tolist(), strict=True))
    scaled = torch.tensor([[-1.0, 0.0, 1.0], [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5]]).sum(0)
    expected = (scaled / scaled.std()).tolist()
    assert [advantages[5], advantages[6], advantages[1]] == pytest.approx(expected, abs=1e-3)
