"""Imports vLLM and the trainer once, then forks a process for each line that it reads: `{"family", "folder"}`.

A process of its own, so that a crash, or what an engine leaves behind, ends with its family. The answer is a line for
each, in order of finishing.
"""

from __future__ import annotations

import os

for name, value in {
    "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_PLUGINS": "tandem",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)  # before torch, which reads the first of them when it is imported

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from vllm.model_executor.models import registry

from support.matrix import Outcome, judge

TIMEOUT_S = 120


def main() -> None:
    torch.set_num_threads(1)
    registry._run_in_subprocess = lambda inspect: inspect()  # a process that imports vLLM, for each model class
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job.pop("folder"))
        folder.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child == 0:
            _run(folder, **job)
        _, status = os.waitpid(child, 0)
        _end_group(child)
        print(json.dumps({"job": job, **_outcome(folder, status)}), flush=True)


def _run(folder: Path, family: str, **changes: object) -> None:
    os.setsid()  # so that the engine's process ends with this one's group
    signal.alarm(TIMEOUT_S)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    outcome = judge(family, folder, **changes)
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_group(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _outcome(folder: Path, status: int) -> dict[str, object]:
    file = folder / "outcome.json"
    if file.exists():
        return json.loads(file.read_text())
    return asdict(Outcome("failed", f"the process ended with status {status}; its log is {folder / 'log'}"))


if __name__ == "__main__":
    main()
