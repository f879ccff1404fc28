"""Which parameters of a model a version does not reach."""

from __future__ import annotations

import pytest
from torch import nn

pytestmark = pytest.mark.vllm


def _missing(model: nn.Module, *loaded: str) -> list[str]:
    pytest.importorskip("vllm")
    from tandem_generator.volume_engine import _not_in

    return _not_in(set(loaded), model)


def test_a_parameter_is_missing_under_its_first_name() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(2, 2), "up": nn.Linear(2, 2, bias=False)})
    assert _missing(model, "gate.weight") == ["gate.bias", "up.weight"]


@pytest.mark.parametrize("loaded", ["mlp.gate.weight", "mlp.experts.gate.weight"])
def test_a_shared_parameter_is_reached_under_any_of_its_names(loaded: str) -> None:
    gate = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleDict({"gate": gate}), "gate": gate})})
    assert _missing(model, loaded) == []
    assert _missing(model) == ["mlp.experts.gate.weight"]
