"""Test that a switch of weights updates everything that the model computes with.

A switch fails silently if it does not reach a part of the parameters, or if vLLM computes with something that it
derived from the parameters at load time: a packed or transposed copy, the product of two matrices (multi-head latent
attention), or a buffer in another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

SAMPLED = 4096
"""Number of elements that are compared one by one per tensor, spread evenly over it."""
_CHUNK = 1 << 24
"""Number of elements that are looked at together."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of an element in bytes → type of its bit pattern."""


class _Mark(NamedTuple):
    """Stands for the content of a tensor. A complete copy of the model might not fit into memory."""

    total: int
    """Sum of the bit patterns of all elements. A NaN has a larger one than any number."""
    sample: bytes
    """Bytes of some elements, in order."""


def rehearse(
    model: nn.Module,
    *,
    spoil: Callable[[], object],
    process: Callable[[], object],
    load: Callable[[], object],
) -> str:
    """Overwrite all parameters with NaN, load the original weights again, and compare.

    Args:
        model: The loaded model.
        spoil: Loads a version whose elements are all NaN, as a switch does.
        process: Derives tensors from the parameters, as vLLM does after it has loaded a model.
        load: Loads the weights that `model` already has, as a switch does.

    Returns:
        What went wrong. Empty if `model` is unchanged.
    """
    before = _marks(model)
    try:
        spoil()
    except Exception as error:  # any type: the model's own code runs here
        return f"vLLM does not load the tensors that a trainer publishes ({type(error).__name__}: {error})"
    if unreached := [name for name, it in model.named_parameters() if _has_numbers(it)]:
        return f"the tensors that a trainer publishes do not reach all elements of {_list(unreached)}"
    process()
    load()
    after = _marks(model)
    stale = [name for name in before if before[name] != after.get(name)]
    return f"{_list(stale)} differ when the same weights are loaded again" if stale else ""


def _list(names: list[str]) -> str:
    return f"{len(names)} of its tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _has_numbers(parameter: Tensor) -> bool:
    """Whether a parameter that was overwritten with NaN still has numbers.

    Zeros count only if there is nothing else, because vLLM pads parameters with zeros.
    """
    if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
        return False
    has_nan = False
    for part_N in _parts(parameter.detach()):
        if part_N.nan_to_num(0.0).any():
            return True
        has_nan = has_nan or bool(part_N.isnan().any())
    return not has_nan


def _marks(model: nn.Module) -> dict[str, _Mark]:
    return {name: _mark(tensor.detach()) for name, tensor in _tensors(model) if not tensor.is_meta}


def _mark(tensor: Tensor) -> _Mark:
    total, sample = 0, b""
    step = max(1, tensor.numel() // SAMPLED)
    for part_N in _parts(tensor):
        bits_N = part_N.view(_INTEGERS[part_N.itemsize])
        total += int(bits_N.sum(dtype=torch.int64).item())
        sample += bits_N[::step].contiguous().cpu().numpy().tobytes()
    return _Mark(total, sample)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements of a tensor in parts, one after the other: whoever computes with all of them needs a copy."""
    if not tensor.dim():
        tensor = tensor.reshape(1)
    rows = max(1, _CHUNK * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows].reshape(-1)


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
