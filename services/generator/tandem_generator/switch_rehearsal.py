"""Test that a switch of weights updates everything that the model computes with.

A switch copies the new tensors over the parameters of the running model. This fails silently if vLLM computes with
something that it derived from the parameters at load time: a packed or transposed copy, the product of two matrices
(multi-head latent attention), or a buffer in another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

SAMPLED = 4096
"""Number of elements that are compared per tensor, spread evenly over it."""


def stale_tensors(model: nn.Module, load: Callable[[], object], process: Callable[[], object]) -> list[str]:
    """Change all parameters, load the original weights again, and compare.

    Args:
        model: The loaded model.
        load: Loads the weights that `model` already has, as a switch does.
        process: Derives tensors from the parameters, as vLLM does after it has loaded a model.

    Returns:
        Names of the tensors that differ afterwards. If there are none, the model is unchanged.
    """
    before = _samples(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                # Zeros stay zero. vLLM pads parameters with zeros, and no checkpoint would restore them.
                parameter.mul_(0.5)
    process()  # derive tensors from the changed parameters
    load()
    after = _samples(model)
    return [name for name in before if not torch.equal(before[name], after[name])]


def _samples(model: nn.Module) -> dict[str, Tensor]:
    """Return name → bytes of some elements. A complete copy of the model might not fit into memory."""
    return {name: _sample(tensor) for name, tensor in _tensors(model) if not tensor.is_meta}


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone().cpu().view(torch.uint8)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, buffers, and all other tensors of the modules and their attention implementations."""
    yield from model.state_dict(keep_vars=True).items()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        for holder in (module, getattr(module, "impl", None)):
            for attribute, value in vars(holder).items() if holder is not None else ():
                # The content of a KV cache depends on requests, not on weights.
                if isinstance(value, Tensor) and attribute != "kv_cache":
                    yield f"{name}.{attribute}", value
