"""Start real trainer processes in about a second: they are forked from a process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from support.generators import TOKEN

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["tandem_trainer.process", "transformers.models.llama.modeling_llama"])


def start_trainer(config: Path, log: Path, prepare: Callable[[], object] | None = None) -> ForkServerProcess:
    """Start a trainer in its own process, which calls `prepare` first. Its output is appended to `log`."""
    process = _forkserver.Process(target=_train, args=(config, log, prepare))
    process.start()
    return process


def _train(config: Path, log: Path, prepare: Callable[[], object] | None) -> None:
    from tandem_trainer.__main__ import main  # imported only in the child, because it imports torch

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["TANDEM_TOKEN"] = TOKEN
    # One core, because threads that wait for each other would cost a tiny model seconds.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if prepare:
        prepare()
    sys.exit(main(["--config", str(config)]))
