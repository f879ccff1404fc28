"""An update equals a step of AdamW on the complete batch, and never uses a loss that is not finite."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from support.models import make_tiny_model, make_tokenizer
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError
from tandem_trainer.algorithms.base import Algorithm, MicroBatchLoss
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.algorithms.objectives import LOSS_TYPES
from tandem_trainer.algorithms.online_dpo import OnlineDpo
from tandem_trainer.batch import Batch
from tandem_trainer.learner.learner import Learner


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def _config(**trainer: Any) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {"max_steps": 10, "rewards": [{"function": "rewards:r"}], "optim": {"learning_rate": 0.01}} | trainer
    )


def _learner(model_dir: Path, config: TrainerConfig, *, reference: bool = False) -> Learner:
    shared = SharedConfig(model=str(model_dir))
    return Learner(shared, config, make_tokenizer(), Accelerator(cpu=True), needs_reference=reference)


def _grpo(**options: Any) -> Grpo:
    return Grpo(_config(grpo=options))


def _batch(algorithm: Grpo) -> Batch:
    completions = [completion([6, 7, 8]), completion([9]), completion([10, 11, 12, 13, 2]), completion([14, 15])]
    groups = [
        scored([4, 5], completions, [1.0, 0.0, 0.5, 0.0]),
        scored([5] * 9, completions[::-1], [0.0, 1.0, 1.0, 3.0]),
    ]
    return algorithm.make_batch(groups)


def _parameters(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


class Broken(Grpo):
    """An algorithm whose loss is NaN in the last optimizer step of a batch, which is the second or the only one."""

    def loss(self, *args: Any, **kwargs: Any) -> MicroBatchLoss:
        micro_batch_loss = super().loss(*args, **kwargs)
        is_second_step = bool((args[0].detach() != kwargs["old_logprobs_BT"]).any())
        if is_second_step or self.num_iterations == 1:
            return micro_batch_loss._replace(loss=micro_batch_loss.loss * float("nan"))
        return micro_batch_loss


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("max_tokens", [1, 20])
def test_splitting_into_micro_batches_does_not_change_the_update(model_dir: Path, loss_type: str, max_tokens: int):
    got = _assert_micro_batches_equal_full_batch(
        model_dir, max_tokens, updates=2, loss_type=loss_type, epsilon_high=1.5, beta=0.1, num_iterations=2
    )
    assert got["kl_reference"] > 0, "the policy of the second step has changed"


@pytest.mark.parametrize("max_tokens", [1, 20])
def test_splitting_into_micro_batches_does_not_change_the_top_entropy_tokens(model_dir: Path, max_tokens: int):
    # After the first step, policies and therefore entropies would differ by rounding.
    _assert_micro_batches_equal_full_batch(model_dir, max_tokens, updates=1, top_entropy_quantile=0.3)


@pytest.mark.parametrize("max_tokens", [1, 20])
def test_splitting_into_micro_batches_does_not_change_online_dpo(model_dir: Path, max_tokens: int):
    rollout = {"num_generations": 2}
    algorithm = OnlineDpo(_config(algorithm="online_dpo", rollout=rollout, online_dpo={"missing_eos_penalty": 0.1}))
    completions = [completion([6, 7, 8]), completion([9]), completion([10, 11, 12, 13, 2]), completion([14, 15])]
    pairs = [([4, 5], completions[:2]), ([5] * 9, completions[2:]), ([6], completions[1:3])]
    groups = [scored(prompt, pair, [0.0, 1.0]) for prompt, pair in pairs]
    got = _compare(model_dir, algorithm, lambda: algorithm.make_batch(groups), max_tokens, updates=2)
    assert got["rewards/margins"] > 0
    assert got["rewards/accuracies"] == 1.0


def _assert_micro_batches_equal_full_batch(
    model_dir: Path, max_tokens: int, *, updates: int, **options: Any
) -> dict[str, float]:
    algorithm = _grpo(**options)
    return _compare(model_dir, algorithm, lambda: _batch(algorithm), max_tokens, updates=updates)


def _compare(
    model_dir: Path, algorithm: Algorithm, make_batch: Callable[[], Batch], max_tokens: int, *, updates: int
) -> dict[str, float]:
    unsplit = _learner(model_dir, _config(), reference=True)
    split = _learner(model_dir, _config(learner={"max_tokens_per_micro_batch": max_tokens}), reference=True)
    for _ in range(updates):
        expected = unsplit.update(make_batch(), algorithm)
        got = split.update(make_batch(), algorithm)
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # AdamW divides by the gradient's size, which amplifies rounding of tiny gradients.
    torch.testing.assert_close(_parameters(split), _parameters(unsplit), atol=1e-3, rtol=0)
    return got


@pytest.mark.parametrize("option", ["gradient_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_options_for_speed_and_memory_do_not_change_the_update(model_dir: Path, option: str):
    if option == "compile" and not shutil.which("g++"):
        pytest.skip("torch.compile needs g++")
    algorithm = _grpo()
    plain = _learner(model_dir, _config())
    optioned = _learner(model_dir, _config(learner={option: True, "max_tokens_per_micro_batch": 20}))
    for _ in range(2):
        expected = plain.update(_batch(algorithm), algorithm)
        got = optioned.update(_batch(algorithm), algorithm)
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert ("_compiled_call_impl" in vars(optioned.model.base_model)) == (option == "compile")


def test_batch_is_split_into_micro_batches_by_default(model_dir: Path):
    learner = _learner(model_dir, _config())
    algorithm = _grpo()
    seen: list[int] = []
    learner.model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    groups = [scored([4] * 60, [completion([5 + i] * 60) for i in range(20)], [float(i) for i in range(20)])]
    learner.update(algorithm.make_batch(groups), algorithm)
    assert seen == [60, 14 * 60, 6 * 60], "the prompt once, then completions with a part of it, 1024 in all"


def test_adamw_8bit_without_bitsandbytes_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="adamw_8bit needs the package bitsandbytes"):
        _learner(model_dir, _config(optim={"name": "adamw_8bit"}))


def test_old_policy_of_several_iterations_is_the_one_before_the_first(model_dir: Path):
    learner = _learner(model_dir, _config())
    algorithm = _grpo(num_iterations=3, epsilon=0.02)
    stats = learner.update(_batch(algorithm), algorithm)
    assert stats["clip_ratio/region_mean"] > 0
    assert stats["learning_rate"] == 0.01
    once = _learner(model_dir, _config())
    for _ in range(3):
        stats = once.update(_batch(_grpo()), _grpo(epsilon=0.02))
        assert stats["clip_ratio/region_mean"] == 0
    assert not torch.allclose(_parameters(learner), _parameters(once), atol=1e-3)


def test_parameters_between_two_iterations_belong_to_no_version(model_dir: Path):
    learner = _learner(model_dir, _config())
    broken = Broken(_config(grpo={"num_iterations": 2}))
    with pytest.raises(FloatingPointError, match="loss nan"):
        learner.update(_batch(broken), broken)
    assert learner.completed_updates is None


def test_an_update_raises_the_logprob_of_better_completions(model_dir: Path):
    learner, algorithm = _learner(model_dir, _config()), _grpo()
    batch = algorithm.make_batch([scored([4], [completion([6]), completion([7])], [1.0, 0.0])])

    def logits() -> torch.Tensor:
        return learner.model(input_ids=torch.tensor([[4]])).logits[0, -1].detach()

    before = logits()
    stats = learner.update(batch, algorithm)
    gap = (logits() - before)[6] - (logits() - before)[7]
    assert gap > 0
    assert stats["learning_rate"] == 0.01
    assert stats["grad_norm"] > 0


def test_non_finite_loss_raises_before_the_parameters_change(model_dir: Path):
    learner, algorithm = _learner(model_dir, _config()), _grpo()

    before = _parameters(learner)
    with pytest.raises(FloatingPointError, match="loss nan"):
        learner.update(_batch(algorithm), Broken(_config()))
    assert torch.equal(_parameters(learner), before)
    assert learner.completed_updates == 0
    learner.update(_batch(algorithm), algorithm)
    assert torch.isfinite(_parameters(learner)).all()
    assert learner.completed_updates == 1


def test_loaded_learner_continues_bit_for_bit(model_dir: Path, tmp_path: Path):
    config = _config(optim={"learning_rate": 0.01, "lr_scheduler_type": "linear", "warmup_steps": 3})
    algorithm, learner = _grpo(), _learner(model_dir, config)
    learner.update(_batch(algorithm), algorithm)
    learner.save(tmp_path)
    expected = learner.update(_batch(algorithm), algorithm)
    resumed = _learner(model_dir, config)
    resumed.load(tmp_path)
    assert resumed.update(_batch(algorithm), algorithm) == expected
    assert torch.equal(_parameters(resumed), _parameters(learner))


def test_model_that_does_not_exist_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no-such-model"):
        _learner(tmp_path / "no-such-model", _config())
