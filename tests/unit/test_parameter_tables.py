"""Trainer and generator derive the same parameter table, for every model, file layout and adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from support.engines import FACTS
from support.models import make_tiny_model
from support.weights import FINGERPRINT
from tandem_generator.compatibility import check_version_fits
from tandem_generator.engines.mock import MockEngine
from tandem_protocol.config import ConfigError, SharedConfig
from tandem_protocol.config.generator import MockConfig
from tandem_protocol.config.learning import LoraConfig
from tandem_protocol.errors import WeightsRefused
from tandem_protocol.fingerprint import checkpoint_shapes
from tandem_protocol.manifest import FileEntry, Manifest, TensorEntry
from tandem_protocol.parameters import Shapes, describe_differences
from tandem_protocol.version import Version
from tandem_trainer.learner.lora import add_adapter
from tandem_trainer.learner.model import load_model
from tandem_trainer.learner.shards import model_shapes

COMMON = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
GATED = {"intermediate_size": 64, "num_key_value_heads": 1, **COMMON}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "llama, tied": LlamaConfig(tie_word_embeddings=True, **GATED),
    "gpt_neox": GPTNeoXConfig(intermediate_size=64, **COMMON),
    "gpt_neox, tied": GPTNeoXConfig(intermediate_size=64, tie_word_embeddings=True, **COMMON),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
    "opt": OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **COMMON),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
    "phi3": Phi3Config(pad_token_id=0, **GATED),
}
EXPERTS = MixtralConfig(num_local_experts=2, **GATED)
QWEN_EXPERTS = Qwen3MoeConfig(num_experts=4, moe_intermediate_size=16, mlp_only_layers=[], **GATED)


def _trainer(directory: Path, *, adapted: bool = False) -> Shapes:
    model = load_model(directory, SharedConfig(model=str(directory)))
    if adapted:
        add_adapter(model, LoraConfig(r=2), str(directory))
    return model_shapes(model)


def _mock(directory: Path) -> Shapes | None:
    return MockEngine(str(directory), MockConfig(), None).facts.shapes


def _vllm(directory: Path) -> Shapes:
    pytest.importorskip("vllm")
    from tandem_generator.engines.vllm import _parameter_tables

    return _parameter_tables(directory, trust_remote_code=False)[0]


@pytest.mark.vllm
@pytest.mark.parametrize("name", CONFIGS)
def test_both_sides_derive_the_same_table_with_and_without_an_adapter(name: str, tmp_path: Path):
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    table = _trainer(tmp_path)
    assert describe_differences(table, _vllm(tmp_path)) == ""
    assert describe_differences(table, _mock(tmp_path) or {}) == ""
    assert describe_differences(_trainer(tmp_path, adapted=True), table) == ""


@pytest.mark.vllm
def test_table_lists_each_expert_on_both_sides(tmp_path: Path):
    AutoModelForCausalLM.from_config(EXPERTS).save_pretrained(tmp_path)
    table = _trainer(tmp_path)
    assert table["model.layers.1.block_sparse_moe.experts.0.w1.weight"] == (64, 32)
    assert describe_differences(table, _vllm(tmp_path)) == describe_differences(table, _mock(tmp_path) or {}) == ""


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (CONFIGS["llama"], "model.layers.1.self_attn.q_proj.weight"),
        (CONFIGS["phi3"], "model.layers.0.mlp.gate_up_proj.weight"),
        (EXPERTS, "model.layers.1.block_sparse_moe.experts.1.w3.weight"),
        (QWEN_EXPERTS, "model.layers.0.mlp.experts.3.up_proj.weight"),
    ],
)
def test_a_version_that_lacks_a_part_of_a_fused_parameter_is_refused(
    config: PreTrainedConfig, left_out: str, tmp_path: Path
):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    facts = FACTS._replace(shapes=_vllm(tmp_path))
    table = dict(_trainer(tmp_path))
    check_version_fits(_manifest(table), facts)
    del table[left_out]
    with pytest.raises(WeightsRefused, match=f"1 parameter differs: {left_out}: trainer none, generator "):
        check_version_fits(_manifest(table), facts)


def _manifest(table: Shapes) -> Manifest:
    """Return the manifest of a version that has these tensors."""
    file = FileEntry(name="model.safetensors", size_bytes=0, xxh3_128="0")
    tensors = tuple(TensorEntry(name=name, dtype="F32", shape=shape, file=file.name) for name, shape in table.items())
    return Manifest(run="test", version=Version(1, 1), fingerprint=FINGERPRINT, files=(file,), tensors=tensors)


@pytest.mark.vllm
def test_a_model_that_transformers_cannot_create_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ConfigError, match="transformers cannot create"):
        _vllm(tmp_path)


def test_gpt_neox_is_published_under_the_names_of_its_checkpoints(tmp_path: Path):
    AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"]).save_pretrained(tmp_path)
    assert _trainer(tmp_path)["embed_out.weight"] == (64, 32)
    tied = tmp_path / "tied"
    AutoModelForCausalLM.from_config(CONFIGS["gpt_neox, tied"]).save_pretrained(tied)
    assert "embed_out.weight" not in _trainer(tied)


# -- the same model in other files -----------------------------------------------------------------------------------


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def save_tied_copy(directory: Path) -> None:
    tensors = _tensors(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def leave_strays(directory: Path) -> None:
    for name in ("adapter_model.safetensors", "consolidated.safetensors", "model-00001-of-00002.safetensors"):
        save_file({"stray": torch.zeros(3)}, directory / name)
    (directory / "original").mkdir()
    save_file({"stray": torch.zeros(3)}, directory / "original" / "model.safetensors")
    (directory / "training_args.bin").write_bytes(b"stray")


def save_in_shards(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert (directory / "model.safetensors.index.json").is_file()
    save_file({"stray": torch.zeros(3)}, directory / "consolidated.safetensors")


def save_buffers(directory: Path) -> None:
    tensors = _tensors(directory) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("write", [save_tied_copy, leave_strays, save_in_shards, save_buffers])
def test_layout_of_the_files_does_not_change_the_table(write: Callable[[Path], None], tmp_path: Path):
    table = _trainer(make_tiny_model(tmp_path))
    write(tmp_path)
    assert describe_differences(table, _trainer(tmp_path)) == ""
    assert describe_differences(table, _mock(tmp_path) or {}) == ""


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("gpt_neox", "embed_out.", "lm_head."), ("gpt2", "transformer.", ""), ("bloom", "transformer.", "")],
)
def test_published_names_do_not_depend_on_names_in_the_files(name: str, old: str, new: str, tmp_path: Path):
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    table, tensors = _trainer(tmp_path), _tensors(tmp_path)
    renamed = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    assert describe_differences(table, _trainer(tmp_path)) == ""
    if not new:
        assert describe_differences(table, _mock(tmp_path) or {}) == ""


def test_mock_does_not_know_weights_that_are_not_safetensors(tmp_path: Path):
    table = _trainer(make_tiny_model(tmp_path))
    torch.save(_tensors(tmp_path), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").rename(tmp_path / "stray.safetensors")
    assert describe_differences(table, _trainer(tmp_path)) == ""
    assert _mock(tmp_path) is None


def test_untied_head_is_listed_although_another_setting_would_tie_it(tmp_path: Path):
    make_tiny_model(tmp_path, tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "tie_word_embeddings"}))
    assert checkpoint_shapes(tmp_path)["lm_head.weight"] == (64, 32)


def test_first_three_differences_are_reported_with_both_shapes():
    trainer = {"a": (1,), "b": (2, 3), "c": (4,), "d": (5,), "same": (6,)}
    generator = {"b": (2, 4), "c": (5,), "e": (1,), "same": (6,)}
    assert describe_differences(trainer, generator) == (
        "5 parameters differ: b: trainer (2, 3), generator (2, 4); c: trainer (4,), generator (5,); "
        "a: trainer (1,), generator none"
    )
    assert describe_differences({"a": (1,)}, {"a": (2,)}) == "1 parameter differs: a: trainer (1,), generator (2,)"
    assert describe_differences(trainer, trainer) == ""
