"""Whether a switch of weights reaches all that a loaded model computes with, tried out before the first switch.

A version is copied over the parameters of the live model. That is right where each parameter is a copy of checkpoint
tensors. It is silently wrong where vLLM keeps something else that it made of them when it loaded the model: a packed
or transposed copy, two matrices multiplied with each other (multi-head latent attention), a cast buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

SAMPLED = 4096
"""Elements of a tensor that are compared, spread over all of it."""


def stale_tensors(model: nn.Module, load: Callable[[], object], process: Callable[[], object]) -> list[str]:
    """The names of what `load` does not bring back after every parameter was changed; the model is as before if none.

    Args:
        load: copies the weights that `model` holds over its parameters, as a switch does.
        process: makes of the parameters what vLLM makes of them once it has loaded a model.
    """
    before = _samples(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(0.5)  # the zeros that fill up a parameter stay, which no checkpoint brings back
    process()  # what vLLM makes of parameters is of the changed ones from here on
    load()
    after = _samples(model)
    return [name for name in before if not torch.equal(before[name], after[name])]


def _samples(model: nn.Module) -> dict[str, Tensor]:
    """Name → bytes of some elements, so that two copies of a model need not fit into memory."""
    return {name: _sample(tensor) for name, tensor in _tensors(model) if not tensor.is_meta}


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone().cpu().view(torch.uint8)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and every other tensor that a module or its attention implementation holds."""
    yield from model.state_dict(keep_vars=True).items()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        for holder in (module, getattr(module, "impl", None)):
            for attribute, value in vars(holder).items() if holder is not None else ():
                # A KV cache is what requests have left there.
                if isinstance(value, Tensor) and attribute != "kv_cache":
                    yield f"{name}.{attribute}", value
