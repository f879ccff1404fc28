"""What a copy over the parameters does not reach is found before the first switch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tandem_generator.rehearsal import stale_tensors


class Layer(nn.Module):
    """A linear layer whose weight may be kept in another form as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.kv_cache = torch.empty(4)


class Absorbed(Layer):
    """Multi-head latent attention keeps what it has made of a projection."""

    product: torch.Tensor

    def process(self) -> None:
        self.product = self.weight.detach().T @ self.weight.detach()


class Implemented(Layer):
    """The attention's implementation, which is no module, holds a cast copy."""

    def __init__(self) -> None:
        super().__init__()
        self.impl = SimpleNamespace()

    def process(self) -> None:
        self.impl.sinks = self.weight.detach().double()


def test_plain_copies_come_back_whole() -> None:
    layer = Layer()
    base = layer.weight.detach().clone()
    assert stale_tensors(layer, lambda: layer.weight.data.copy_(base), lambda: None) == []
    assert torch.equal(layer.weight, base)


def test_a_product_that_is_made_after_loading_is_named() -> None:
    layer = Absorbed()
    layer.process()
    base = layer.weight.detach().clone()
    stale = stale_tensors(nn.ModuleDict({"attention": layer}), lambda: layer.weight.data.copy_(base), layer.process)
    assert stale == ["attention.product"]


def test_a_copy_in_the_attentions_implementation_is_named() -> None:
    layer = Implemented()
    layer.process()
    base = layer.weight.detach().clone()
    assert stale_tensors(layer, lambda: layer.weight.data.copy_(base), layer.process) == [".sinks"]


def test_a_parameter_that_is_loaded_in_part_is_named() -> None:
    layer = Layer()
    base = layer.weight.detach().clone()

    def load() -> None:
        layer.weight.data[:2].copy_(base[:2])

    assert stale_tensors(layer, load, lambda: None) == ["weight"]


def test_a_weight_that_was_transposed_after_loading_is_named() -> None:
    layer = Layer()
    layer.weight = nn.Parameter(torch.randn(4, 4))
    base = layer.weight.detach().clone()
    layer.weight.data = base.T.clone()
    assert stale_tensors(layer, lambda: layer.weight.data.copy_(base), lambda: None) == ["weight"]
