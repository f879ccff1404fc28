"""Both sides refuse a quantized model before they read its weights. The message names the method and a fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.models import make_tiny_model
from tandem_generator.__main__ import main as generator
from tandem_protocol.config import SharedConfig
from tandem_protocol.quantization import quantization_problem
from tandem_rollout.errors import UserError
from tandem_trainer.learner.model import load_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


def _edit(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


METHODS: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq, 4 bits"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq, 4 bits"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"load_in_8bit": True}}, "load_in_8bit"),
    ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "fp8"),
    (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        "compressed-tensors",
    ),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
    ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ({"quantization_config": {"group_size": 128}}, "unknown"),
    ({"quantization_config": {}}, "unknown"),
]


@pytest.mark.parametrize(("changes", "method"), METHODS)
def test_both_sides_refuse_a_quantized_model_with_the_same_reason(
    model: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], method: str
):
    _edit(model, **changes)
    (model / "model.safetensors").unlink()  # nothing reads it
    with pytest.raises(UserError) as refused:
        load_model(model, SharedConfig(model=str(model)))
    assert f"is quantized ({method})" in str(refused.value)
    assert "Fix: choose the model that it was made from" in str(refused.value)
    for engine in ("mock", "vllm"):
        assert generator(["--model", str(model), "--engine", engine]) == 2
        assert capsys.readouterr().err.endswith(f" ERROR    {refused.value}\n")


@pytest.mark.parametrize(
    ("file", "method"),
    [("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq"), ("quant_config.json", "awq")],
)
def test_quantization_is_found_in_a_file_beside_config_json(model: Path, file: str, method: str):
    (model / file).write_text("{}")
    assert f"is quantized ({method})" in (quantization_problem("m", model) or "")


@pytest.mark.parametrize("changes", [{}, {"quantization_config": None}, {"torch_dtype": "float16"}])
def test_model_that_is_not_quantized_is_accepted(model: Path, changes: dict[str, Any]):
    _edit(model, **changes)
    assert quantization_problem("m", model) is None
    assert load_model(model, SharedConfig(model=str(model))).dtype == torch.float32


def test_quantization_is_found_from_scales_among_the_weights(model: Path):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors | {f"{name}_scale": torch.ones(1)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.weight_scale, so its weights are"):
        load_model(model, SharedConfig(model=str(model)))


def test_the_generator_s_own_quantization_is_refused(model: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", str(model), "--engine", "mock", "--generator.vllm", "{quantization: fp8}"]
    assert generator(arguments) == 2
    assert "generator.vllm.quantization is fp8" in capsys.readouterr().err
