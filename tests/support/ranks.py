"""Run several ranks on this machine that communicate over gloo, as `accelerate launch` would start them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

from support.forked import forkserver
from support.ports import free_port

TIMEOUT_S = 120.0


def run_ranks(ranks: int, function: Callable[..., object], *arguments: Any) -> None:
    """Call `function(*arguments)` in `ranks` processes at the same time.

    The processes are forked from one that has imported everything, because importing torch takes seconds. They have the
    environment variables of that process.

    Raises:
        AssertionError: a process failed (stderr has its traceback), or it ran longer than TIMEOUT_S.
    """
    parent = forkserver.Process(target=_fork, args=(ranks, function, arguments))
    parent.start()
    parent.join(TIMEOUT_S + 60)
    assert parent.exitcode == 0, f"the ranks ended with exit code {parent.exitcode}, expected 0; 7 means a timeout"


def _fork(ranks: int, function: Callable[..., object], arguments: Sequence[Any]) -> None:
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, ranks, port, function, arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    os._exit(7 if hung else max(abs(process.exitcode or 0) for process in processes))


def _rank(rank: int, ranks: int, port: int, function: Callable[..., object], arguments: Sequence[Any]) -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    disable_progress_bar()
    function(*arguments)
