"""Agreement between the processes (ranks) of one trainer. Every rank calls these functions at the same time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from tandem_protocol.folders import TEMPORARY
from tandem_protocol.once import warn_once
from tandem_protocol.problems import one_line

ResultT = TypeVar("ResultT")

log = logging.getLogger(__name__)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """True if `flag` is true on any rank."""
    return any_ranks(accelerator, flag)[0]


def any_ranks(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Return for each flag whether it is true on any rank."""
    on_device = torch.tensor(flags, dtype=torch.int32, device=accelerator.device)
    return [bool(ranks) for ranks in accelerator.reduce(on_device, reduction="sum").tolist()]


class PartFailed(OSError):
    """A part failed on one of the ranks. The message says why."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        """
        Args:
            may_pass: on the rank that failed, whether another try may succeed: the disk was full, for example.
        """
        super().__init__(message)
        self.may_pass = may_pass


def do_together(accelerator: Accelerator, *parts: Callable[[], object]) -> None:
    """Run `parts` one after the other on all ranks.

    After each part the ranks agree whether to continue. A rank that continued alone would wait for the others forever.

    Raises:
        PartFailed: on every rank, if a part failed on one of them.
    """
    for part in parts:
        problem: PartFailed | None = None
        try:
            part()
        except PartFailed as error:
            problem = error
        except Exception as error:
            may_pass = isinstance(error, OSError) and error.errno in TEMPORARY
            problem = PartFailed(f"{type(error).__name__}: {one_line(error)}", may_pass=may_pass)
            log.debug("process %s failed", accelerator.process_index, exc_info=True)
        if any_rank(accelerator, problem is not None):
            raise problem or PartFailed("it failed on another rank")


class FailedTogether(Exception):
    """A part failed on at least one of the ranks. The cause is this rank's own error, if it has one."""


def together(accelerator: Accelerator, part: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """Run `part`, which involves no other rank, and return its result if it succeeds on all ranks.

    Without this, a rank that failed would leave, and the others would wait for it in vain. So they all fail at the same
    place, and can write a checkpoint together.

    Raises:
        FailedTogether: with several ranks, if `part` failed on one of them. A single rank raises its own error.
    """
    failure = None
    try:
        result = part(*arguments)
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        failure = error
        warn_once(log, f"a trainer process has failed ({one_line(error)}); all of them end after this step")
    try:
        if not any_rank(accelerator, failure is not None):
            return result
    except RuntimeError:  # another rank has ended meanwhile
        if failure is not None:
            raise failure from None
        raise
    raise FailedTogether("another trainer process has failed") from failure


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise this rank's own error, if it has one, in place of `FailedTogether`."""
    try:
        yield
    except FailedTogether as failed:
        raise failed.__cause__ or failed from None


def has_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process has left: NCCL's error type, or gloo's text."""
    if not torch.distributed.is_initialized():
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
