"""What is published is the model under its checkpoint names, in the wanted precision."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from support.models import make_tiny_model
from tandem_protocol.fingerprint import checkpoint_shapes, differences, fingerprint
from tandem_trainer import publish
from tandem_trainer.publish import fingerprint_of, published_tensors, write_shards


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_values_are_those_of_the_checkpoint(tmp_path: Path, tied: bool):
    model = LlamaForCausalLM.from_pretrained(make_tiny_model(tmp_path, tied=tied))
    tensors = published_tensors(model, torch.float32)
    saved = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == saved.keys()
    assert ("lm_head.weight" in tensors) is not tied
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)


def test_shards_hold_the_wanted_precision(tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    write_shards(published_tensors(model, torch.bfloat16), tmp_path)
    written = {k: v for shard in tmp_path.glob("*.safetensors") for k, v in load_file(shard).items()}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["model.norm.weight"], model.model.norm.weight.bfloat16())


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(publish, "save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        publish.write_shards({"a": torch.zeros(4)}, tmp_path)
    assert error.value.errno == errno.ENOSPC


def test_the_fingerprint_tells_sizes_apart(tmp_path: Path):
    small = make_tiny_model(tmp_path / "small", vocab=64)
    model = LlamaForCausalLM.from_pretrained(small)
    ours = fingerprint_of(model, small)
    assert differences(ours, fingerprint(small, checkpoint_shapes(small))) == []
    other = make_tiny_model(tmp_path / "other", vocab=70)
    assert "parameters" in differences(ours, fingerprint(other, checkpoint_shapes(other)))
