"""The optimizer and its schedule follow the configuration, even if it changes when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM

from support.models import make_tiny_model, make_tokenizer
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.learning import OptimConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.optimizer import Schedule, parameter_groups

REWARDS = [{"function": "rewards:r"}]
GROUP = scored([4, 5], [completion([6, 7, 8]), completion([9])], [1.0, 0.0])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def _config(max_steps: int = 10, **optim: Any) -> TrainerConfig:
    return TrainerConfig.model_validate({"max_steps": max_steps, "rewards": REWARDS, "optim": optim})


def _learner(model_dir: Path, config: TrainerConfig) -> Learner:
    shared = SharedConfig(model=str(model_dir))
    return Learner(shared, config, make_tokenizer(), Accelerator(cpu=True), needs_reference=False)


def _update(learner: Learner, config: TrainerConfig) -> dict[str, Any]:
    algorithm = Grpo(config)
    return learner.update(algorithm.make_batch([GROUP]), algorithm)


def _parameters(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


BEFORE: dict[str, Any] = {"learning_rate": 0.01, "lr_scheduler_type": "linear", "warmup_steps": 2}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.1), ("weight_decay", 0.5), ("adam_beta1", 0.5), ("adam_beta2", 0.9), ("adam_epsilon", 0.1),
        ("max_grad_norm", 1e-3), ("lr_scheduler_type", "constant"), ("lr_scheduler_type", "cosine"),
        ("warmup_steps", 0), ("max_steps", 20),
    ],
)  # fmt: skip
def test_a_changed_setting_takes_effect_on_resume(model_dir: Path, tmp_path: Path, setting: str, value: Any):
    """With the same weights and moments, the resumed run equals a run that always had the new setting."""
    before, after = _config(**BEFORE), _config(**BEFORE | {setting: value})
    if setting == "max_steps":
        after = _config(value, **BEFORE)
    first = _learner(model_dir, before)
    for _ in range(3):
        _update(first, before)
    first.save(tmp_path)

    resumed = _learner(model_dir, after)
    resumed.load(tmp_path)
    options = resumed._optimizer.optimizer.param_groups
    expected_options = _expected(after)
    assert [{k: group[k] for k in expected} for group, expected in zip(options, expected_options, strict=True)] == (
        expected_options
    )
    unchanged = _learner(model_dir, before)
    unchanged.load(tmp_path)
    stats, old_stats = _update(resumed, after), _update(unchanged, before)
    assert stats["learning_rate"] == _rates(after, 4)[3]
    assert stats["grad_norm"] == old_stats["grad_norm"], "the weights are those of the checkpoint"
    assert not torch.equal(_parameters(resumed), _parameters(unchanged)), "the setting had no effect"


def _expected(config: TrainerConfig) -> list[dict[str, Any]]:
    optim = config.optim
    common = {"betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_epsilon, "lr": _rates(config, 4)[3]}
    return [common | {"weight_decay": optim.weight_decay}, common | {"weight_decay": 0.0}]


def _rates(config: TrainerConfig, count: int) -> list[float]:
    """The learning rates of an uninterrupted run."""
    schedule = _schedule(config)
    rates = []
    for _ in range(count):
        rates.append(schedule.learning_rate)
        schedule.advance()
    return rates


def _schedule(config: TrainerConfig) -> Schedule:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim.learning_rate)
    schedule = Schedule(optimizer, config.optim, max_steps=config.max_steps)
    optimizer.step()  # otherwise torch warns that the schedule is ahead of its optimizer
    return schedule


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("updates", [0, 1, 3, 9])
def test_resumed_schedule_continues_bit_for_bit(kind: str, updates: int):
    config = _config(learning_rate=0.01, lr_scheduler_type=kind, warmup_steps=3)
    schedule = _schedule(config)
    schedule.resume(updates)
    assert schedule.updates == updates
    assert schedule.learning_rate == _rates(config, updates + 1)[updates]
    schedule.advance()
    assert schedule.learning_rate == _rates(config, updates + 2)[updates + 1]


def test_optimizer_checkpoint_holds_moments_and_counts_but_no_settings(model_dir: Path, tmp_path: Path):
    config = _config(**BEFORE)
    learner = _learner(model_dir, config)
    _update(learner, config)
    learner.save(tmp_path)
    names = FileSystemReader(tmp_path / "optimizer").read_metadata().state_dict_metadata
    assert {name.rsplit(".", 1)[-1] for name in names} == {"exp_avg", "exp_avg_sq", "step"}
    assert set(torch.load(tmp_path / "learner.pt", weights_only=True)) == {"updates", "rng"}


def test_norms_and_biases_get_no_weight_decay(model_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-2] for p in spared["params"]} == {
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "bloom", "qwen2", "gemma2", "olmo2", "cohere"])
def test_weight_decay_applies_to_the_same_parameters_as_in_transformers(name: str):
    config = AutoConfig.for_model(
        name, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    if name == "gpt2":
        config.n_embd, config.n_layer, config.n_head = 16, 1, 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spared = {id(p) for p in parameter_groups(model, 0.1)[1]["params"]}
    for key, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and "norm" not in key
        assert (id(parameter) not in spared) == is_matrix, key


def test_update_decays_only_matrices(model_dir: Path):
    """With a tiny learning rate and a huge decay, only parameters with weight decay change."""
    config = _config(learning_rate=1e-6, weight_decay=1e4, adam_epsilon=1e6)
    learner = _learner(model_dir, config)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    _update(learner, config)
    for name, parameter in learner.model.named_parameters():
        ratio = float((parameter.detach() / before[name]).nanmedian())  # the embedding of the padding token is 0
        assert ratio == pytest.approx(1.0 if "norm" in name else 0.99, abs=1e-3), name


def test_every_optim_option_is_tested():
    tested = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"}
    assert set(OptimConfig.model_fields) == tested | {"lr_scheduler_type", "warmup_steps", "name"}
