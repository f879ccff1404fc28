"""What the trainer computes on: the one place that asks for the kind of device."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from . import trackers
from .config import TrainerConfig
from .errors import UserError

CPU_MAX_TOKENS, GPU_MAX_TOKENS = 1024, 8192


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Over the ranks that `accelerate launch` has started, on their devices.

    Raises:
        UserError: `accelerate launch` was told to shard the model, which the configuration decides; a tracker is not
            installed.
    """
    trackers.check_installed(config)
    for name, theirs in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "").lower() == "true":
            raise UserError(
                f"accelerate launch was told to use {theirs}; wanted plain processes (`accelerate launch --multi_gpu "
                "--num_processes N`, or TANDEM_TRAINER_PROCESSES=N with `python -m tandem_trainer.launch`). To spread "
                "parameters over them, as FSDP and DeepSpeed's ZeRO-3 do, set trainer.learner.parallelism: fsdp2."
            )
    # Without this accelerate starts several CPU processes as strangers.
    on_cpu = not torch.accelerator.is_available()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if config.learner.dtype == "bfloat16" else "no",
        log_with=list(config.trackers),
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
