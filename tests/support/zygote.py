"""Imports vLLM and the trainer once, then forks a process for each line that it reads: `{"family", "folder"}`.

A process for each, so that a crash, or what an engine leaves behind, ends with its family. Each answer is a line:
`{"family", "folder", …}` with the fields of an `Outcome`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker  # noqa: F401 - what an engine's process would import
from vllm.model_executor.models import registry

from support.matrix import Outcome, judge

TIMEOUT_S = 90


def main() -> None:
    torch.set_num_threads(1)
    registry._run_in_subprocess = lambda inspect: inspect()  # it would import vLLM again for each model class
    for line in sys.stdin:
        job = json.loads(line)
        outcome = _in_child(**{**job, "folder": Path(job["folder"])})
        print(json.dumps(job | asdict(outcome)), flush=True)


def _in_child(folder: Path, family: str, **changes: object) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        _judge(folder, family, **changes)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    file = folder / "outcome.json"
    if file.exists():
        return Outcome(**json.loads(file.read_text()))
    return Outcome("failed", f"the process ended with status {status}; {folder / 'log'} says more")


def _judge(folder: Path, family: str, **changes: object) -> None:
    """In the child, which ends here."""
    os.setsid()  # so that the engine's process can be ended with this one
    signal.alarm(TIMEOUT_S)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    outcome = judge(family, folder, **changes)
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))
    os._exit(0)


if __name__ == "__main__":
    main()
