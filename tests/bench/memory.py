"""Measure the peak memory of each process while a tiny model is trained, with the mock and with vLLM.

python tests/bench/memory.py [--steps 5]
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, options, train, write
from support.generators import Generator, running
from support.models import make_tiny_model

IMPORT = "import resource, {modules}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def peak_mb(generator: Generator) -> float:
    """Return the peak memory of a generator and its processes."""
    process = psutil.Process(generator.process.pid)
    pids = [process.pid, *(child.pid for child in process.children(recursive=True))]
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return sum(int(found[1]) for text in texts if (found := re.search(r"VmHWM:\s+(\d+)", text))) / 1024


def imported_mb(*modules: str) -> float:
    """Return the peak memory of a process that only imports modules."""
    command = [sys.executable, "-c", IMPORT.format(modules=", ".join(modules))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout.splitlines()[-1]) / 1024


def measure(engine: str, steps: int, folder: Path) -> tuple[float, float]:
    """Train, and return the peaks of generator and trainer."""
    model = make_tiny_model(folder / "model")
    rollout = {"num_prompts": 8, "num_generations": 8, "max_completion_length": 32}
    cpu = max(os.sched_getaffinity(0))
    with running(engine, model, folder / "weights", log=folder / "log") as generator:
        train(folder / "run", model, folder / "weights", [generator.port], cpu=cpu, max_steps=steps, rollout=rollout)
        # The trainer is the largest process that has ended.
        return peak_mb(generator), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for engine, modules in (("mock", ["fastapi", "uvicorn"]), ("vllm", ["torch", "vllm.entrypoints.llm"])):
        with tempfile.TemporaryDirectory() as folder:
            generator_mb, trainer_mb = measure(engine, 1 if args.quick else args.steps, Path(folder))
        if engine == "mock":  # later, other large processes have ended
            rows.append(["trainer", f"{trainer_mb:,.0f}", f"{imported_mb('torch', 'transformers', 'accelerate'):,.0f}"])
        rows.append([f"generator, {engine}", f"{generator_mb:,.0f}", f"{imported_mb(*modules):,.0f}"])
    columns = ["process", "peak, MB", "of which its libraries, MB"]
    note = "vLLM's generator has a KV cache of 1 GiB, of which it uses little here."
    write([Table(title="A model of 30,000 parameters", columns=columns, rows=rows, note=note)], args.result)


if __name__ == "__main__":
    main()
