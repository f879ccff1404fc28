"""Import vLLM and the trainer once, then fork a child for each line on stdin: `{"family", "folder"}`.

Each family has its own child, so that a crash or leftovers of an engine do not affect other families. For each line it
prints one line `{"family", "folder", …}` with the fields of an `Outcome`.
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
import vllm.v1.worker.cpu_worker  # noqa: F401 - the engine's process would import it
from vllm.model_executor.models import registry

from support.matrix import Outcome, judge

TIMEOUT_S = 90


def main() -> None:
    torch.set_num_threads(1)
    registry._run_in_subprocess = lambda inspect: inspect()  # a subprocess would import vLLM again for each model class
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
    return Outcome("failed", f"the process ended with status {status}; see {folder / 'log'}")


def _judge(folder: Path, family: str, **changes: object) -> None:
    """Judge a family in the child process, and exit."""
    os.setsid()  # so that the engine's process can be killed with this one
    signal.alarm(TIMEOUT_S)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    outcome = judge(family, folder, **changes)
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))
    os._exit(0)


if __name__ == "__main__":
    main()
