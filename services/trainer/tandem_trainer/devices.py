"""The trainer's devices. This is the only module that distinguishes between CPU and GPU."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.ports import LOOPBACK_ONLY

from .environment import check_environment
from .run import trackers

log = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
QUEUED_BYTES = 1 << 30
"""Copies to host memory that may wait in a GPU's queue. What they copy stays in the GPU's memory until then."""
CPU_MAX_TOKENS, GPU_MAX_TOKENS = 1024, 8192
CPU_SOFTMAX_LOGITS, GPU_SOFTMAX_LOGITS = 2**22, 2**25


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Return the `Accelerator` for the ranks that `accelerate launch` has started.

    Raises:
        UserError: accelerate's settings contradict the configuration, or a tracker is not installed.
    """
    trackers.check_installed(config)
    stay_on_loopback(os.environ)
    has_accelerator = torch.accelerator.is_available()
    check_environment(os.environ, config, has_accelerator=has_accelerator)
    return Accelerator(
        cpu=not has_accelerator,  # without it, accelerate does not connect several CPU processes
        mixed_precision="bf16" if config.learner.dtype == "bfloat16" else "no",
        log_with=list(config.trackers) or None,
        project_dir=config.run_dir,
    )


def stay_on_loopback(env: MutableMapping[str, str]) -> None:
    """Have ranks that are all on this machine listen on its loopback address, unless the user names an interface.

    Ranks on several nodes listen on the address of one interface, which gloo and NCCL choose.
    """
    if "WORLD_SIZE" in env and env["WORLD_SIZE"] == env.get("LOCAL_WORLD_SIZE"):
        for name, interface in LOOPBACK_ONLY.items():
            env.setdefault(name, interface)


def all_accelerators(accelerator: Accelerator) -> list[str]:
    """Return the UUIDs of the GPUs of all ranks, as the driver writes them. Empty on CPUs.

    Collective: every rank must call it. All get the same list, so that they all stop if one has to.
    """
    device = accelerator.device
    own = [] if device.type == "cpu" else [f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    everyones: list[str] = gather_object(own)
    return everyones


def default_max_tokens(device: torch.device) -> int:
    """Return the default size of a micro-batch in tokens. A GPU needs large ones to be busy; a CPU does not."""
    return CPU_MAX_TOKENS if device.type == "cpu" else GPU_MAX_TOKENS


def softmax_logits(device: torch.device) -> int:
    """Return the number of logits that one softmax computes with, which limits the temporary memory that it needs.

    Many small operations keep the CPU busy that starts them, and the GPU waits.
    """
    return CPU_SOFTMAX_LOGITS if device.type == "cpu" else GPU_SOFTMAX_LOGITS


def give_back_freed_memory() -> None:
    """Return freed host memory to the operating system.

    glibc keeps freed activations in pieces that are too small for the next micro-batch (docs/reference/measured.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def copies_before_writing(device: torch.device) -> bool:
    """Return whether to copy a version into `HostMemory` first, even if nothing is trained meanwhile.

    From a GPU, a copy into pinned memory is about ten times as fast as one into other memory.
    """
    return device.type != "cpu"


def _pin(flat_N: Tensor, *, owner: object) -> None:
    """Pin the memory of a tensor for as long as `owner` exists. Without the right to, copies to it are slower.

    The pinned memory that torch allocates is rounded up to a power of 2, so it is not used.
    """
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
    try:
        torch.cuda.check_error(int(cuda.cudaHostRegister(flat_N.data_ptr(), flat_N.nbytes, 0)))
    except torch.cuda.CudaError as error:
        log.warning(
            "%d bytes of host memory cannot be pinned: %s. Weights leave the GPU more slowly. Fix: raise the limit of "
            "locked memory (ulimit -l) of this process.", flat_N.nbytes, error,
        )  # fmt: skip
        with suppress(RuntimeError):  # CUDA also reports the error to the next kernel that starts
            torch.zeros(1, device="cuda")
        return
    # If memory is freed while it is pinned, CUDA copies from where it was, also for the tensors that come next.
    weakref.finalize(owner, _unpin, flat_N)


def _unpin(flat_N: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(flat_N.data_ptr())  # type: ignore[no-untyped-call]  # torch's


class HostMemory:
    """Host memory for a copy of the tensors that a rank publishes. Each copy takes the place of the one before.

    On a GPU the memory is pinned, and the copies run on a stream of their own.
    """

    def __init__(self, table: Mapping[str, Tensor], device: torch.device) -> None:
        """
        Args:
            table: the tensors, which need no data.
        """
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]  # torch's
        self._queued_bytes = 0
        places, size_bytes = {}, 0
        for name, tensor in table.items():
            places[name] = size_bytes
            size_bytes += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        flat_N = torch.empty(size_bytes, dtype=torch.uint8)
        if self._stream and size_bytes:
            _pin(flat_N, owner=self)
        self._tensors = {
            name: flat_N[start : start + table[name].nbytes].view(table[name].dtype).view(table[name].shape)
            for name, start in places.items()
        }

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor into its place, and return that. It is complete after `wait`."""
        place = self._tensors[name]
        if self._stream is None or not tensor.is_cuda:
            return place.copy_(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            place.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory may be freed before the copy is complete
        self._queued_bytes += tensor.nbytes
        if self._queued_bytes > QUEUED_BYTES:
            self.wait()
        return place

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._stream is not None:
            self._stream.synchronize()
        self._queued_bytes = 0


def train_on_cpu_without_accelerator() -> None:
    """Set `use_cpu` for transformers' trainers on a machine without an accelerator.

    Without it, they refuse bf16, which is TRL's default, and several processes.
    """
    from transformers import TrainingArguments  # takes a second that Tandem's own trainer does not need

    if torch.accelerator.is_available():
        return
    check = TrainingArguments.__post_init__

    @functools.wraps(check)
    def wrapped_check(self: TrainingArguments) -> None:
        self.use_cpu = True
        check(self)

    TrainingArguments.__post_init__ = wrapped_check


@contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """Make torch name the CPU as its accelerator if there is none, for libraries that expect one."""
    named, index = torch.accelerator.current_accelerator, torch.cuda.current_device

    def current_accelerator(*args: Any, **kwargs: Any) -> torch.device:
        return named(*args, **kwargs) or torch.device("cpu")

    def current_device() -> int:
        return index() if torch.cuda.is_available() else 0

    torch.accelerator.current_accelerator, torch.cuda.current_device = current_accelerator, current_device
    try:
        yield
    finally:
        torch.accelerator.current_accelerator, torch.cuda.current_device = named, index
