"""Judge model families in parallel (`support.matrix`), each in a process that is forked from a prepared one."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/reference/architectures.json"
"""The outcomes that `tests/golden/record_architectures.py` recorded."""
ENV = {
    "OMP_NUM_THREADS": "1",  # threads that wait for each other would cost a tiny model seconds
    "TORCHDYNAMO_DISABLE": "1",  # compiling the ranks of logprobs, which are unused, would take two seconds
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Variables of a process that runs vLLM with a tiny model."""


@contextmanager
def judged(families: Sequence[str], folder: Path, workers: int = 2) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """Yield a future with the `Outcome`, as a dictionary, of each family. The logs are written to `folder`.

    `llama, tied` is the family `llama` with another value of `tie_word_embeddings` than its default.
    """
    idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
    processes = [_start(folder / f"family-{number}.log") for number in range(workers)]
    for process in processes:
        idle.put(process)

    def judge(family: str) -> dict[str, Any]:
        process = idle.get()
        assert process.stdin
        assert process.stdout
        try:
            name, _, tying = family.partition(", ")
            changes = {"tie_word_embeddings": tying == "tied"} if tying else {}
            process.stdin.write(json.dumps({"family": name, "folder": str(folder / family), **changes}) + "\n")
            process.stdin.flush()
            outcome: dict[str, Any] = json.loads(process.stdout.readline())
            return outcome
        finally:
            idle.put(process)

    with ThreadPoolExecutor(workers) as pool:
        try:
            yield {family: pool.submit(judge, family) for family in families}
        finally:
            pool.shutdown(cancel_futures=True)
            for process in processes:
                process.terminate()
                process.wait()


def _start(log: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "support.family_process"],
            env={**os.environ, **ENV, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
