"""Agreement between the processes (ranks) of one trainer. Every rank calls these functions at the same time."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator

log = logging.getLogger(__name__)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """True if `flag` is true on any rank."""
    flags = torch.tensor([flag], dtype=torch.int32, device=accelerator.device)
    return bool(accelerator.reduce(flags, reduction="sum").item())


class PartFailed(OSError):
    """A part failed on one of the ranks. The message says why."""


def do_together(accelerator: Accelerator, *parts: Callable[[], object]) -> None:
    """Run `parts` one after the other on all ranks.

    After each part the ranks agree whether to continue. A rank that continued alone would wait for the others forever.

    Raises:
        PartFailed: on every rank, if a part failed on one of them.
    """
    for part in parts:
        problem = None
        try:
            part()
        except PartFailed as error:
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            log.debug("process %s failed", accelerator.process_index, exc_info=True)
        if any_rank(accelerator, problem is not None):
            raise PartFailed(problem or "it failed on another rank")


def has_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process has left: NCCL's error type, or gloo's text."""
    if not torch.distributed.is_initialized():
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
