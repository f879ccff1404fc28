"""Models with files that transformers would not write: they are trained and exported, or refused before step 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from support.generators import running
from support.models import make_tiny_model, make_tokenizer
from support.projects import Project
from tandem_cli.__main__ import main as tandem
from tandem_protocol.store import WeightStore
from tandem_trainer.merge import main as merge

VICUNA = '{"do_sample": false, "temperature": 0.9, "top_p": 0.6}'
"""A generation config that transformers reads but refuses to write."""
IDS = torch.tensor([[4, 5, 6, 7]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with Llama-2's generation config, dropout, a copy of the tied embeddings, and unrelated weight files."""
    folder = make_tiny_model(tmp_path_factory.mktemp("odd"))
    (folder / "generation_config.json").write_text(VICUNA)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    tensors = load_file(folder / "model.safetensors")
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | copy, folder / "model.safetensors", {"format": "pt"})
    save_file({"stray": torch.zeros(2)}, folder / "adapter_model.safetensors")
    save_file({"stray": torch.zeros(2)}, folder / "consolidated.safetensors")
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    return found


def test_an_exported_model_has_the_trained_weights_and_the_users_own_files(
    make_project: Any, model: Path, tmp_path: Path
):
    project = make_project(max_steps=2)
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    assert project.steps == [1, 2]
    exported = tmp_path / "exported"
    assert tandem(["export", str(project.run_dir), "--to", str(exported)]) == 0
    assert (exported / "generation_config.json").read_text() == VICUNA
    assert json.loads((exported / "config.json").read_text())["attention_dropout"] == 0.5
    text = "1+2=3"
    assert AutoTokenizer.from_pretrained(exported)(text) == AutoTokenizer.from_pretrained(model)(text)
    loaded = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    trained = project.parameters(2)
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    store = WeightStore(project.directory.parent / "weights")
    manifest, _ = store.read(store.versions()[-1])
    published = load_file(store.directory(manifest.version) / manifest.files[0].name)
    assert published.keys() == trained.keys()
    assert all(torch.equal(published[name], trained[name]) for name in trained)


def test_an_adapter_on_tied_embeddings_merges_into_a_model_with_the_users_own_files(
    make_project: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project = make_project(max_steps=2, lora={"r": 4}, optim={"learning_rate": 0.1})
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    adapter = project.run_dir / "checkpoints" / "000002" / "model"
    merged = tmp_path / "merged"
    monkeypatch.chdir(project.directory)
    assert merge([str(adapter), str(merged), "--dtype", "float32"]) == 0
    assert (merged / "generation_config.json").read_text() == VICUNA
    torch.testing.assert_close(logits(merged), logits(adapter), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged), logits(model), atol=1e-3)


def test_gpt_neox_is_trained_with_the_parameter_names_of_its_checkpoint(tmp_path: Path):
    folder = tmp_path / "neox"
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, hidden_dropout=0.5, attention_dropout=0.5, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (tmp_path / "weights").mkdir()
    with running("mock", folder, tmp_path / "weights", log=tmp_path / "generator.log") as generator:
        project = Project(tmp_path / "project", folder, generator, tmp_path / "weights", max_steps=2)
        ended = project.train()
    assert ended.returncode == 0, ended.stderr
    assert "embed_out.weight" in project.parameters(2)
    assert json.loads((project.run_dir / "checkpoints/000002/model/config.json").read_text())["hidden_dropout"] == 0.5


def test_a_model_that_cannot_be_trained_or_served_is_refused_before_the_first_step(make_project: Any, tmp_path: Path):
    project = make_project()
    quantized = make_tiny_model(tmp_path / "quantized")
    other = make_tiny_model(tmp_path / "other", vocab=70)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    for arguments, words in [
        (("--trainer.lora={target_modules: [embed_tokens]}",), ["embed_tokens (Embedding)", "linear layers only"]),
        ((f"--shared.model={quantized}",), ["is quantized (awq)"]),
        (
            (f"--shared.model={other}",),
            ["1 parameter differs: model.embed_tokens.weight: trainer (70, 32), generator (64, 32)"],
        ),
    ]:
        ended = project.train(*arguments)
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
        assert [word for word in words if word not in ended.stderr] == [], ended.stderr
    assert not (project.run_dir / "metrics.jsonl").exists()
