"""Tensors that a switch of weights does not update are found before the first switch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tandem_generator import switch_rehearsal
from tandem_generator.switch_rehearsal import SAMPLED, rehearse


class Layer(nn.Module):
    """A linear layer. Subclasses also keep its weight in another form."""

    def __init__(self, rows: int = 3, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 4, dtype=dtype))
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.kv_cache = torch.empty(4)

    def process(self) -> None:
        """Derive tensors from the weight."""


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


def rehearsed(
    layer: Layer,
    spoil: Callable[[], object] | None = None,
    load: Callable[[], object] | None = None,
    base: torch.Tensor | None = None,
) -> str:
    """Rehearse with a layer that is the part `attention` of a model. By default, both loads reach all elements."""
    layer.process()
    base = layer.weight.detach().clone() if base is None else base
    return rehearse(
        nn.ModuleDict({"attention": layer}),
        spoil=spoil or (lambda: layer.weight.data.fill_(torch.nan)),
        process=layer.process,
        load=load or (lambda: layer.weight.data.copy_(base)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_plain_parameter_is_restored(dtype: torch.dtype) -> None:
    layer = Layer(dtype=dtype)
    base = layer.weight.detach().clone()
    assert rehearsed(layer) == ""
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize(("layer", "name"), [(Absorbed(), "product"), (Implemented(), "sinks")])
def test_what_was_derived_from_a_weight_is_named(layer: Layer, name: str) -> None:
    assert f"1 of its tensors (attention.{name}) differ" in rehearsed(layer)


def test_one_element_that_is_not_loaded_is_found_in_a_large_tensor() -> None:
    layer = Layer(rows=SAMPLED)
    base = layer.weight.detach().clone()

    def load() -> None:
        layer.weight.data[:-1] = base[:-1]
        layer.weight.data[-1, :3] = base[-1, :3]

    assert "1 of its tensors (attention.weight) differ" in rehearsed(layer, load=load)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5), (2, 3, 4)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_tensor_is_read_in_parts_that_together_are_all_of_it(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], is_transposed: bool
) -> None:
    monkeypatch.setattr(switch_rehearsal, "_CHUNK", 10)
    tensor = torch.randn(shape)
    tensor = tensor.transpose(0, -1) if is_transposed and tensor.dim() else tensor
    parts = list(switch_rehearsal._parts(tensor))
    assert torch.equal(torch.cat([torch.empty(0), *parts]), tensor.reshape(-1))
    assert all(part.numel() <= max(10, tensor[0].numel()) for part in parts if tensor.dim() and tensor.numel())


def test_a_transposed_weight_is_named() -> None:
    layer = Layer(rows=4)
    base = layer.weight.detach().clone()
    layer.weight.data = base.T.clone()
    assert "1 of its tensors (attention.weight) differ" in rehearsed(layer, base=base)


def test_one_element_that_a_version_does_not_reach_is_found_although_the_base_weights_reach_it() -> None:
    layer = Layer(rows=SAMPLED)

    def spoil() -> None:
        layer.weight.data[:-1] = torch.nan
        layer.weight.data[-1, :3] = torch.nan

    assert "do not reach all elements of 1 of its tensors (attention.weight)" in rehearsed(layer, spoil=spoil)


def test_a_parameter_of_zeros_that_a_version_does_not_reach_is_found() -> None:
    layer = Layer()
    layer.weight.data.zero_()
    assert "do not reach all elements" in rehearsed(layer, spoil=lambda: None)


def test_zeros_that_pad_a_parameter_need_not_be_reached() -> None:
    layer = Layer()
    layer.weight.data[-1] = 0
    assert rehearsed(layer, spoil=lambda: layer.weight.data[:-1].fill_(torch.nan)) == ""


def test_a_name_that_the_engine_does_not_know_is_reported() -> None:
    def spoil() -> None:
        raise KeyError("model.layers.0.w1.weight")

    assert "does not load the tensors that a trainer publishes (KeyError: 'model.layers.0.w1.weight')" in rehearsed(
        Layer(), spoil=spoil
    )
