"""Measure the peak memory of each process while a tiny model is trained, with the mock and with vLLM.

python tests/bench/memory.py [--steps 5]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, options, train, write
from support.generators import running
from support.models import make_tiny_model

IMPORT = "import {modules}; print(open('/proc/self/status').read())"
POLL_S = 0.1


def peaks_mb(pids: Iterable[int]) -> float:
    """Return the sum of the peak memory of processes. The kernel's `ru_maxrss` would count what started them, too."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):  # it has ended
            total += peak_mb(Path(f"/proc/{pid}/status").read_text())
    return total


def peak_mb(status: str) -> float:
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0


def imported_mb(*modules: str) -> float:
    """Return the peak memory of a process that only imports modules."""
    command = [sys.executable, "-c", IMPORT.format(modules=", ".join(modules))]
    return peak_mb(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


@contextmanager
def watched(word: str) -> Iterator[list[float]]:
    """Read the peak memory of a child whose command line has `word`, until the end of the block."""
    peaks, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_S):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    peaks.append(peaks_mb([child.pid]) if word in child.cmdline() else 0.0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def measure(engine: str, steps: int, folder: Path) -> tuple[float, float]:
    """Train, and return the peaks of generator and trainer."""
    model = make_tiny_model(folder / "model")
    rollout = {"num_prompts": 8, "num_generations": 8, "max_completion_length": 32}
    cpu = max(os.sched_getaffinity(0))
    with running(engine, model, folder / "weights", log=folder / "log") as generator:
        with watched("tandem_trainer") as peaks:
            train(
                folder / "run",
                model,
                folder / "weights",
                [generator.port],
                cpus=[cpu],
                max_steps=steps,
                rollout=rollout,
            )
        process = psutil.Process(generator.process.pid)
        family = [process, *process.children(recursive=True)]
        return peaks_mb(one.pid for one in family), max(peaks)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for engine, modules in (("mock", ["fastapi", "uvicorn"]), ("vllm", ["torch", "vllm.entrypoints.llm"])):
        with tempfile.TemporaryDirectory() as folder:
            generator_mb, trainer_mb = measure(engine, 1 if args.quick else args.steps, Path(folder))
        if engine == "mock":  # the trainer is the same with both
            rows.append(["trainer", f"{trainer_mb:,.0f}", f"{imported_mb('torch', 'transformers', 'accelerate'):,.0f}"])
        rows.append([f"generator, {engine}", f"{generator_mb:,.0f}", f"{imported_mb(*modules):,.0f}"])
    columns = ["process", "peak, MB", "of which its libraries, MB"]
    note = "vLLM's generator has a KV cache of 1 GiB, of which it uses little here."
    write([Table(title="A model of 30,000 parameters", columns=columns, rows=rows, note=note)], args.result)


if __name__ == "__main__":
    main()
