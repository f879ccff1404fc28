"""The GPU that `tests/gpu` and `tests/bench/gpu.py` measure, or this machine's CPU in its place.

On a machine without a GPU, `TANDEM_GPU=cpu` runs both on the CPU, so that they can be tried.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from tandem_protocol.config.trainer import TrainerConfig
from tandem_trainer.devices import make_accelerator

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}
"""Part of the card's name → its dense bfloat16 matrix products per second. Source: NVIDIA's data sheets (SXM cards)."""


def missing() -> str | None:
    """Say why tests that need a GPU cannot run here. None if they can."""
    if torch.accelerator.is_available() or os.environ.get("TANDEM_GPU") == "cpu":
        return None
    return "torch finds no GPU; TANDEM_GPU=cpu tries these tests on the CPU"


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def name() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else f"CPU ({platform.machine()})"


def peak_tflops() -> float | None:
    """Matrix products per second according to the data sheet. None if the card is not in the table."""
    return next((value for part, value in PEAK_TFLOPS.items() if part in name()), None)


def memory_bytes() -> int | None:
    """Memory of the card. None on a CPU."""
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if device().type == "cuda" else None
    )


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(action: Callable[[], object]) -> float:
    """Seconds of `action` on the device."""
    synchronize()
    began = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - began


def reset_peak(*, empties_cache: bool = True) -> None:
    gc.collect()  # models are in reference cycles
    if torch.accelerator.is_available():
        torch.empty(1, device=device())  # a device has no statistics before its first tensor
        if empties_cache:
            torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most memory in use since `reset_peak`: tensors on the GPU, or the process on a CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


@contextmanager
def accelerator(config: TrainerConfig, *, cpu: bool = False) -> Iterator[Accelerator]:
    """Yield the trainer's accelerator, or one for the CPU in float32.

    accelerate keeps its device in global state, so only one accelerator is in use at a time.
    """
    _forget()
    try:
        yield Accelerator(cpu=True) if cpu else make_accelerator(config)
    finally:
        _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
