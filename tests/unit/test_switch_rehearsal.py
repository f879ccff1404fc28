"""Tensors that a switch of weights does not update are found before the first switch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tandem_generator.switch_rehearsal import stale_tensors


class Layer(nn.Module):
    """A linear layer. Subclasses also keep its weight in another form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.kv_cache = torch.empty(4)


class Absorbed(Layer):
    """Keeps a product of its weight, as multi-head latent attention does."""

    product: torch.Tensor

    def process(self) -> None:
        self.product = self.weight.detach().T @ self.weight.detach()


class Implemented(Layer):
    """Keeps a cast copy in the attention implementation, which is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.impl = SimpleNamespace()

    def process(self) -> None:
        self.impl.sinks = self.weight.detach().double()


def test_a_plain_parameter_is_restored() -> None:
    layer = Layer()
    base = layer.weight.detach().clone()
    assert stale_tensors(layer, lambda: layer.weight.data.copy_(base), lambda: None) == []
    assert torch.equal(layer.weight, base)


def test_a_product_of_weights_is_reported() -> None:
    layer = Absorbed()
    layer.process()
    base = layer.weight.detach().clone()
    stale = stale_tensors(nn.ModuleDict({"attention": layer}), lambda: layer.weight.data.copy_(base), layer.process)
    assert stale == ["attention.product"]


def test_a_copy_in_the_attention_implementation_is_reported() -> None:
    layer = Implemented()
    layer.process()
    base = layer.weight.detach().clone()
    assert stale_tensors(layer, lambda: layer.weight.data.copy_(base), layer.process) == [".sinks"]


def test_a_partly_loaded_parameter_is_reported() -> None:
    layer = Layer()
    base = layer.weight.detach().clone()

    def load() -> None:
        layer.weight.data[:2].copy_(base[:2])

    assert stale_tensors(layer, load, lambda: None) == ["weight"]


def test_a_transposed_weight_is_reported() -> None:
    layer = Layer()
    layer.weight = nn.Parameter(torch.randn(4, 4))
    base = layer.weight.detach().clone()
    layer.weight.data = base.T.clone()
    assert stale_tensors(layer, lambda: layer.weight.data.copy_(base), lambda: None) == ["weight"]
