"""The check that trainer and generators compute the same probabilities with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from support.models import make_tiny_model, make_tokenizer
from support.rollouts import scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.messages import Completion, VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.errors import UserError
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.batch import Batch
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.mismatch import MismatchCheck


def _config(**trainer: Any) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {"max_steps": 10, "rewards": [{"function": "rewards:r"}], "optim": {"learning_rate": 0.01}} | trainer
    )


def _check(*dtypes: str | None, **trainer: Any) -> MismatchCheck:
    return MismatchCheck(_config(**trainer), dtypes or ("float32",))


def test_mismatch_within_rounding_is_a_fraction_of_what_the_dtypes_explain():
    check = _check("float32")
    check.update(5e-4, 100)
    bf16 = _check("bfloat16")
    bf16.update(0.04, 100)
    assert (check.excess, bf16.excess) == pytest.approx((0.5, 0.8))


@pytest.mark.parametrize(
    ("trainer", "generator", "expected"), [("float32", "float32", 0.001), ("float32", "bfloat16", 0.05),
    ("bfloat16", "float32", 0.05), ("float32", "float32 with a KV cache of fp8", 0.05)],
)  # fmt: skip
def test_mismatch_beyond_rounding_is_a_multiple_and_has_likely_causes(trainer: str, generator: str, expected: float):
    check = _check(generator, learner={"dtype": trainer})
    for _ in range(3):
        check.update(0.1, 100)
    assert check.excess == pytest.approx(0.1 / expected)
    alert = check.description
    assert "differ by 0.1 nats per token" in alert
    assert f"expected at most {expected:g} for {trainer} in the trainer and {generator} in the generators" in alert
    assert "rope scaling" in alert


def test_mismatch_above_the_configured_bound_is_refused():
    check = _check()
    with pytest.raises(UserError, match=r"differ by 0.3 nats .* above trainer.max_mismatch 0.2"):
        check.update(0.3, 100)
    bound = _check(max_mismatch=0.5)
    bound.update(0.3, 100)
    assert bound.excess is not None
    assert bound.excess > 1


def test_lasting_mismatch_is_refused_but_one_small_odd_batch_is_not():
    check = _check("bfloat16")
    for _ in range(5):
        check.update(0.02, 1000)
    check.update(1.0, 100)
    for _ in range(2):
        check.update(0.3, 1000)
    with pytest.raises(UserError):
        check.update(0.3, 1000)


def test_short_completions_are_checked_once_there_are_enough_of_them():
    """With 4 tokens per update, a moving average that always decays would never reach 32 tokens."""
    check = _check()
    for _ in range(7):
        check.update(5.0, 4)
    with pytest.raises(UserError, match="differ by 5 nats"):
        check.update(5.0, 4)


def test_average_over_too_few_tokens_is_not_checked():
    check = _check()
    check.update(5.0, 4)
    check.update(5.0, 0)
    assert check.excess is None
    with pytest.raises(UserError):
        check.update(5.0, 40)


@pytest.mark.parametrize(
    ("dtypes", "trainer"),
    [((None,), {}), (("float32", None), {}), (("float32",), {"rollout": {"top_p": 0.9}}),
     (("float32",), {"rollout": {"repetition_penalty": 1.2}})],
    ids=["mock", "a mock among others", "top_p", "repetition_penalty"],
)  # fmt: skip
def test_probabilities_that_do_not_come_from_the_model_are_not_compared(dtypes: Any, trainer: dict[str, Any]):
    check = _check(*dtypes, **trainer)
    check.update(9.0, 1000)
    assert check.excess is None


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def _learner(model_dir: Path, config: TrainerConfig) -> Learner:
    shared = SharedConfig(model=str(model_dir))
    return Learner(shared, config, make_tokenizer(), Accelerator(cpu=True), needs_reference=False)


def _completion(token_ids: tuple[int, ...], logprobs: tuple[float, ...], *spans: tuple[int, int]) -> Completion:
    """A completion. `spans` lists version steps and their numbers of tokens."""
    versions = tuple(VersionSpan(version=Version(step, 1), tokens=tokens) for step, tokens in spans)
    return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason="stop", versions=versions)


def _logprobs(learner: Learner, prompt: list[int], completion: list[int]) -> list[float]:
    with torch.no_grad():
        logits = learner.model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()


def _batch(learner: Learner, algorithm: Grpo, *, off_by: float) -> Batch:
    """Both completions: tokens 1 and 2 are from the first version, token 3 from an older and very different one."""
    rows = []
    for tokens in ((6, 7, 8), (9, 10, 11)):
        one, two, three = _logprobs(learner, [4, 5], list(tokens))
        rows.append(_completion(tokens, (one + off_by, two - off_by, three - 3.0), (0, 2), (-1, 1)))
    return algorithm.make_batch([scored([4, 5], rows, [1.0, 0.0])])


@pytest.mark.parametrize("max_tokens", [5, 1000])
def test_mismatch_counts_only_tokens_that_the_current_weights_sampled(model_dir: Path, max_tokens: int):
    config = _config(learner={"max_tokens_per_micro_batch": max_tokens}, grpo={"num_iterations": 2})
    learner, algorithm = _learner(model_dir, config), Grpo(config)
    batch = _batch(learner, algorithm, off_by=0.25)
    assert learner.update(batch, algorithm)["mismatch"] == pytest.approx(0.25, abs=1e-5)
    assert "mismatch" not in learner.update(batch, algorithm), "no token was sampled by the current version"


def test_refusal_happens_before_the_parameters_change(model_dir: Path):
    config = _config()
    learner, algorithm = _learner(model_dir, config), Grpo(config)
    learner.mismatch_check = MismatchCheck(config, ["float32"])
    batch = _batch(learner, algorithm, off_by=0.0)
    learner.mismatch_check.update(0.01, 100)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    learner.mismatch_check.update(0.19, 10_000)
    with pytest.raises(UserError, match="The parameters are as before this update"):
        learner.mismatch_check.update(9.0, 100_000)
    with pytest.raises(UserError):
        learner.update(batch, algorithm)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))
    assert learner.completed_updates == 0
