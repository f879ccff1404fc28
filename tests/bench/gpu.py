"""Measure updates and publishing on a GPU: memory, time, and how much of the card is used.

    python tests/bench/gpu.py [--shapes 0.5B 1.5B 7B] [--folder /dev/shm] [--seconds 240] [--only profile] [--tiny]

Models have the shapes of Qwen2.5 and random weights. An update trains on 8 prompts with 8 completions each: 128 + 256
tokens. A publish writes a full version, or a delta, to a folder in memory, and a mock generator verifies and serves it.
Each case prints one row of a table and one line of JSON as soon as it is measured. With OUT=folder, they go into files
as well.

`make bench-gpu` runs this. `--tiny` tries it with a model of 100,000 parameters, on any machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import gpu, gpu_bench_delta, gpu_bench_publish, gpu_bench_update, gpu_profile
from support.gpu_report import Report

CASES = {
    "profile": gpu_profile.cases, "update": gpu_bench_update.cases, "publish": gpu_bench_publish.cases,
    "delta": gpu_bench_delta.cases,
}  # fmt: skip


def machine(folder: Path) -> dict[str, object]:
    """What was measured on, and the speeds that bound the other figures."""
    import accelerate
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    volume = {"folder": str(folder), "free_GB": shutil.disk_usage(folder).free / 1e9, "cores": os.cpu_count()}
    return {"card": gpu.name(), **versions, **volume, **gpu_bench_publish.speeds()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.5B", "1.5B", "7B"])
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
    parser.add_argument("--seconds", type=float, default=240, help="start no case after this time")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="in this order")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    shapes = ["tiny"] if arguments.tiny else arguments.shapes
    deadline = time.monotonic() + arguments.seconds
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    report = Report(deadline)
    report.case("machine", partial(machine, Path(arguments.folder)))
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="tandem-gpu-") as name:
        cases = [case for kind in arguments.only for case in CASES[kind](shapes, Path(name))]
        for title, measure in cases:
            report.case(title, measure)


if __name__ == "__main__":
    main()
