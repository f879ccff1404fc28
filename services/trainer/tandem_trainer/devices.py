"""What the trainer computes on: the one place that asks for the kind of device."""

from __future__ import annotations

import ctypes
import os

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from . import trackers
from .config import TrainerConfig
from .environment import check_environment

CPU_MAX_TOKENS, GPU_MAX_TOKENS = 1024, 8192


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Over the ranks that `accelerate launch` has started, on their devices.

    Raises:
        UserError: accelerate's own settings would change what the configuration decides, or a tracker is not installed.
    """
    trackers.check_installed(config)
    has_accelerator = torch.accelerator.is_available()
    check_environment(os.environ, config, has_accelerator=has_accelerator)
    return Accelerator(
        cpu=not has_accelerator,  # or accelerate starts several CPU processes as strangers
        mixed_precision="bf16" if config.learner.dtype == "bfloat16" else "no",
        log_with=list(config.trackers) or None,
        project_dir=config.run_dir,
    )


def all_accelerators(accelerator: Accelerator) -> list[str]:
    """UUIDs of the accelerators that the ranks compute on, as the driver writes them; none on CPUs.

    Waits for every rank, and gives each the same list, so that all of them stop where one has to.
    """
    device = accelerator.device
    own = [] if device.type == "cpu" else [f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    everyones: list[str] = gather_object(own)
    return everyones


def default_max_tokens(device: torch.device) -> int:
    """Of a micro-batch. Larger ones gain a CPU nothing; a GPU has to be kept busy."""
    return CPU_MAX_TOKENS if device.type == "cpu" else GPU_MAX_TOKENS


def give_back_freed_memory() -> None:
    """Return freed host memory to the system.

    glibc keeps freed activations in pieces that are too small for the next micro-batch (docs/reference/measured.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
