"""How weights are loaded into a model of vLLM's, without vLLM's engine."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.vllm

EXTRA = {"tensorizer": {"tensorizer_config": {"tensorizer_uri": "m.tensors"}}}
"""Load format → what vLLM needs to know about it."""
SINKS = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)


class Kernel:
    """Keeps the sinks in float32, as vLLM's FlashInfer backend does on Blackwell."""

    def __init__(self, sinks: torch.Tensor) -> None:
        self.source, self.sinks = sinks, sinks.float()

    def process_weights_after_loading(self, _: torch.dtype) -> None:
        self.sinks.copy_(self.source)


class Model(nn.Module):
    """A layer of attention with sinks, and a layer without them."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(SINKS.clone(), requires_grad=False)
        self.attention = nn.Module()
        vars(self.attention)["impl"] = Kernel(self.sinks)
        self.linear = nn.Module()
        vars(self.linear)["impl"] = "of another kind"

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for _, tensor in tensors:
            self.sinks.copy_(tensor)
        return {"sinks"}


def engine_of(model: nn.Module, load_format: str = "auto") -> Any:
    pytest.importorskip("vllm")
    from vllm.config import LoadConfig

    from tandem_generator.volume_engine import VolumeWeightEngine

    engine = VolumeWeightEngine.__new__(VolumeWeightEngine)
    engine.model, engine.device = model, torch.device("cpu")
    engine.model_config = SimpleNamespace(model="m", dtype=torch.bfloat16, quantization=None, max_model_len=8)
    config = LoadConfig(load_format=load_format, model_loader_extra_config=EXTRA.get(load_format, {}))
    engine.vllm_config = SimpleNamespace(load_config=config, lora_config=None)
    engine.parallel_config = SimpleNamespace(enable_eplb=False)
    return engine


def test_what_a_kernel_for_attention_keeps_in_another_type_is_loaded_too() -> None:
    model: Any = Model()
    engine_of(model)._load([("sinks", 2 * SINKS)])
    assert torch.equal(model.attention.impl.sinks, 2 * SINKS.float())


@pytest.mark.parametrize("load_format", ["dummy", "sharded_state", "tensorizer"])
def test_a_format_that_vllm_cannot_load_again_is_refused_with_the_fix(load_format: str) -> None:
    engine = engine_of(Model(), load_format)
    with pytest.raises(ValueError, match=f"load_format is '{load_format}', .* Fix: leave out generator.vllm.load_form"):
        engine._source([])
