"""A version identifies its model."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from support.models import make_tiny_model
from tandem_protocol.fingerprint import checkpoint_shapes, differences, fingerprint
from tandem_trainer.publish import fingerprint_of


def test_models_of_different_sizes_have_different_fingerprints(tmp_path: Path):
    small = make_tiny_model(tmp_path / "small", vocab=64)
    model = LlamaForCausalLM.from_pretrained(small)
    ours = fingerprint_of(model, small)
    assert differences(ours, fingerprint(small, checkpoint_shapes(small))) == []
    other = make_tiny_model(tmp_path / "other", vocab=70)
    assert "parameters" in differences(ours, fingerprint(other, checkpoint_shapes(other)))
