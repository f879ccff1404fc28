"""An algorithm of the project is checked before the run, and its mistakes are errors with a fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from support.models import make_tiny_model, make_tokenizer
from support.project_code import write_module
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError
from tandem_trainer import algorithms
from tandem_trainer.algorithms import Algorithm
from tandem_trainer.learner.learner import Learner

CPU = torch.device("cpu")
CODE = """
    from tandem_trainer.algorithms import Algorithm, Grpo, Mean, MicroBatchLoss, OnlineDpo, pad, rows_of

    class BestOfN(Algorithm):
        def __init__(self, config, factor=1.0):
            self.factor = factor
            self.num_iterations = config.grpo.num_iterations

        def make_batch(self, groups):
            scored = [[one for one in group.trajectories if one.in_loss] for group in groups]
            best = [max(of_group, key=lambda one: one.reward) for of_group in scored if of_group]
            rows = [row for one in best for row in rows_of(one, advantage=1.0)]
            tokens = sum(one.num_sampled for one in best)
            return pad(rows, trajectory_total=len(best), token_total=tokens)

        def loss(self, logprobs_BT, batch, totals, entropy_BT):
            loss = -(logprobs_BT * batch.mask_BT).sum() / max(1, totals.tokens)
            return MicroBatchLoss(self.factor * loss, {"imitated": Mean.over(-logprobs_BT, batch.mask_BT)})

    class Duck:
        make_batch = BestOfN.make_batch
        loss = BestOfN.loss
        factor = 1.0

        def __init__(self, config):
            pass

    class Tempered(Grpo):
        def loss(self, logprobs_BT, *args, **kwargs):
            return super().loss(logprobs_BT * 0.5, *args, **kwargs)

    class Judged(OnlineDpo):
        pass

    def make(config):
        return BestOfN(config, factor=3.0)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return write_module(tmp_path, monkeypatch, CODE)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def _config(algorithm: str, **trainer: Any) -> TrainerConfig:
    base = {"max_steps": 9, "rewards": [{"function": "rewards:r"}], "algorithm": algorithm}
    return TrainerConfig.model_validate(base | trainer)


def _stats(model_dir: Path, config: TrainerConfig) -> dict[str, float]:
    algorithm = algorithms.load(config, CPU)
    learner = Learner(
        SharedConfig(model=str(model_dir)),
        config,
        make_tokenizer(),
        Accelerator(cpu=True),
        needs_reference=algorithm.needs_reference,
    )
    groups = [scored([4, 5], [completion([6, 7, 8]), completion([9]), completion([10, 11])], [1.0, None, 0.5])]
    return learner.update(algorithm.make_batch(groups, list), algorithm)


def test_its_loss_is_minimized_and_its_metrics_are_reported(module: str, model_dir: Path) -> None:
    stats = _stats(model_dir, _config(f"{module}:BestOfN"))
    assert stats["loss"] == pytest.approx(stats["imitated"]), "the mean over the tokens of the best completion"
    scaled = _stats(model_dir, _config(f"{module}:BestOfN", algorithm_arguments={"factor": 2.0}))
    assert scaled["loss"] == pytest.approx(2 * stats["loss"])
    assert _stats(model_dir, _config(f"{module}:make"))["loss"] == pytest.approx(3 * stats["loss"])
    assert _stats(model_dir, _config(f"{module}:Duck"))["loss"] == pytest.approx(stats["loss"])


def test_it_may_change_one_method_of_a_built_in_algorithm(module: str, model_dir: Path) -> None:
    options = {"grpo": {"beta": 0.1, "loss_type": "cispo", "epsilon_high": 5.0}}
    assert _stats(model_dir, _config(f"{module}:Tempered", **options))["kl_reference"] > 0


def test_attributes_have_the_defaults_of_the_base_class(module: str) -> None:
    for name in ("BestOfN", "Duck"):
        algorithm = algorithms.load(_config(f"{module}:{name}"), CPU)
        assert not algorithm.needs_reference
        assert (algorithm.num_iterations, algorithm.entropy_quantile) == (1, None)
    assert algorithms.load(_config(f"{module}:Judged", rollout={"num_generations": 2}), CPU).needs_reference


def test_it_may_have_a_judge_or_groups_of_one(module: str) -> None:
    pairs = {"rollout": {"num_generations": 2}, "rewards": [], "online_dpo": {"judge": "judge:better"}}
    algorithms.load(_config(f"{module}:Judged", **pairs), CPU)
    algorithms.load(_config(f"{module}:BestOfN", rollout={"num_generations": 1}), CPU)


HEAD = "from tandem_trainer.algorithms import Algorithm, Grpo, MicroBatchLoss, pad, rows_of\n"
BATCH = """
    def make_batch(self, groups, gather):
        rows = [row for group in groups for one in group.trajectories for row in rows_of(one, 1.0)]
        return pad(rows, trajectory_total=len(rows), token_total=99)
"""
MISTAKES: dict[str, tuple[str, str]] = {
    "no methods": (
        "class Mine:\n    def __init__(self, config): pass",
        "expected an object with the methods make_batch",
    ),
    "a method missing": (f"class Mine(Algorithm):{BATCH}", "abstract method '?loss"),
    "constructor raises": ("class Mine(Grpo):\n    def __init__(self, config): 1 / 0", "ZeroDivisionError"),
    "constructor takes nothing": ("class Mine(Grpo):\n    def __init__(self): pass", "TypeError: .*argument"),
    "not callable": ("Mine = 3", "has no class 'Mine', expected one of"),
    "batch raises": (
        "class Mine(Grpo):\n    def make_batch(self, groups):\n        return max(g.reward for g in groups)",
        r"make_batch: AttributeError: .*reward.*\.py:\d+\). Fix: correct",
    ),
    "a failed episode has no reward": (
        "class Mine(Grpo):\n    def make_batch(self, groups):\n"
        "        return max(one.reward for group in groups for one in group.trajectories)",
        "make_batch: TypeError",
    ),
    "not a batch": (
        "class Mine(Grpo):\n    def make_batch(self, groups): return [1]",
        "returned a list of 1, expected a",
    ),
    "loss raises": ("class Mine(Grpo):\n    def loss(self, *_, **__): return [][1]", "loss: IndexError"),
    "not a MicroBatchLoss": (
        "class Mine(Grpo):\n    def loss(self, logprobs_BT, *_, **__): return logprobs_BT.sum()",
        "loss: returned a tensor of shape .*expected a MicroBatchLoss",
    ),
    "not a scalar": (
        f"class Mine(Algorithm):{BATCH}\n"
        "    def loss(self, logprobs_BT, batch, totals): return MicroBatchLoss(logprobs_BT)",
        "expected a MicroBatchLoss with a scalar",
    ),
    "a mean over the micro-batch": (
        f"class Mine(Algorithm):{BATCH}\n"
        "    def loss(self, logprobs_BT, batch, totals): return MicroBatchLoss(-logprobs_BT.mean())",
        "got loss .*, expected the same",
    ),
    "no reference": (
        f"class Mine(Algorithm):{BATCH}\n"
        "    def loss(self, logprobs_BT, batch, totals, ref_logprobs_BT):\n"
        "        return MicroBatchLoss((logprobs_BT - ref_logprobs_BT).sum() / totals.tokens)",
        "Fix: set needs_reference = True",
    ),
    "metric of Tandem": (
        f"class Mine(Algorithm):{BATCH}\n    def loss(self, logprobs_BT, batch, totals):\n"
        "        return MicroBatchLoss(logprobs_BT.sum() / totals.tokens, {'step': 1})",
        "'step', which metrics.jsonl has already",
    ),
    "a metric without a weight": (
        f"class Mine(Algorithm):{BATCH}\n    def loss(self, logprobs_BT, batch, totals):\n"
        "        return MicroBatchLoss(logprobs_BT.sum() / totals.tokens, {'mine': 1})",
        "returned int as its metric 'mine', expected a Mean",
    ),
}


@pytest.mark.parametrize(("code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_algorithm_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    name = write_module(tmp_path, monkeypatch, HEAD + code)
    with pytest.raises(UserError, match=rf"(?s)algorithm {name}:Mine.*{message}") as refused:
        algorithms.load(_config(f"{name}:Mine"), CPU)
    assert "Fix: " in str(refused.value)


def test_the_loss_of_another_rank_is_not_the_algorithms_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_module(
        tmp_path,
        monkeypatch,
        f"{HEAD}class Mine(Grpo):\n    def make_batch(self, groups, gather): return gather([1.0])",
    )
    algorithm: Algorithm = algorithms.build(_config(f"{name}:Mine"))

    def gather(_: list[float]) -> list[float]:
        raise RuntimeError("gloo: connection closed by peer")

    with pytest.raises(RuntimeError, match="gloo"):
        algorithm.make_batch([], gather)
