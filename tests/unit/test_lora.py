"""Only the adapter is trained, published and saved. The model without it is the reference. peft can load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.models import make_tiny_model, make_tokenizer
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.fingerprint import checkpoint_shapes
from tandem_protocol.manifest import parameters_digest
from tandem_rollout.errors import UserError
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.lora import ADAPTER_FILE, adapter_disabled, adapter_table, write_adapter
from tandem_trainer.merge import main
from tandem_trainer.publish import fingerprint_of

IDS = torch.tensor([[4, 5, 6, 7]])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def _config(**lora: Any) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {
            "max_steps": 10,
            "rewards": [{"function": "rewards:r"}],
            "optim": {"learning_rate": 0.01},
            "grpo": {"beta": 0.1},
            "lora": {"r": 4} | lora,
        }
    )


def _learner(model_dir: Path, **lora: Any) -> Learner:
    shared = SharedConfig(model=str(model_dir))
    return Learner(shared, _config(**lora), make_tokenizer(), Accelerator(cpu=True), needs_reference=True)


def _update(learner: Learner) -> dict[str, float]:
    algorithm = Grpo(_config())
    completions = [completion([6, 7, 8]), completion([9]), completion([10, 11, 12]), completion([14, 15])]
    return learner.update(algorithm.make_batch([scored([4, 5], completions, [1.0, 0.0, 0.5, 0.0])]), algorithm)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def test_only_the_adapter_is_trained_and_the_reference_is_the_model_without_it(model_dir: Path):
    learner, base = _learner(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    assert _update(learner)["kl_reference"] == pytest.approx(0, abs=1e-9), "a new adapter has no effect"
    assert _update(learner)["kl_reference"] > 0
    assert not torch.allclose(_logits(learner.model), _logits(base), atol=1e-3)
    with adapter_disabled(learner.model):
        torch.testing.assert_close(_logits(learner.model), _logits(base))
    trained = {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


def test_peft_loads_the_written_adapter_and_the_base_keeps_its_fingerprint(model_dir: Path, tmp_path: Path):
    learner = _learner(model_dir, r=8, alpha=4.0, target_modules=["q_proj", "down_proj"])
    _update(learner)
    write_adapter(learner.model, tmp_path, torch.float32, is_main=True)
    tensors, table = load_file(tmp_path / ADAPTER_FILE), adapter_table(learner.model, torch.float32)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in table.items()}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_dir)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(_logits(theirs), _logits(learner.model))
    expected = parameters_digest(checkpoint_shapes(model_dir))
    assert fingerprint_of(learner.model, model_dir).parameters == expected


def test_loaded_adapter_continues_bit_for_bit(model_dir: Path, tmp_path: Path):
    learner = _learner(model_dir)
    _update(learner)
    learner.save(tmp_path)
    assert {path.name for path in (tmp_path / "model").glob("*.safetensors")} == {ADAPTER_FILE}
    expected = _update(learner)
    resumed = _learner(model_dir)
    resumed.load(tmp_path)
    assert _update(resumed) == expected
    assert torch.equal(_logits(resumed.model), _logits(learner.model))


def test_merged_model_is_the_policy_and_needs_neither_base_nor_peft(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    learner = _learner(model_dir)
    _update(learner)
    learner.save(tmp_path)
    merged = tmp_path / "merged"
    assert main([str(tmp_path / "model"), str(merged), "--dtype", "float32"]) == 0
    model = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(_logits(model), _logits(learner.model))
    assert checkpoint_shapes(merged) == checkpoint_shapes(model_dir)
    assert (merged / "tokenizer.json").is_file()
    assert main([str(model_dir), str(tmp_path / "other")]) == 2
    assert main([str(tmp_path / "model"), str(merged)]) == 2
    assert "expected the model folder of a LoRA run's checkpoint" in capsys.readouterr().err


def test_target_modules_that_the_model_lacks_are_named(model_dir: Path):
    with pytest.raises(UserError, match=r"trainer\.lora\.target_modules.*no_such"):
        _learner(model_dir, target_modules=["no_such"])
