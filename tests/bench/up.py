"""Measure the seconds from `docker compose up` to the first step, with images but without volumes.

    python tests/bench/up.py                                  # mock, this checkout
    python tests/bench/up.py --engines mock vllm --before ../old-checkout

The checkouts take turns. Build their images first, under different names if they are of different versions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.projects import write_project
from support.stack import ROOT, Stack, set_steps

POLL_S = 0.1
TIMEOUT_S = 600.0
HAS_STEP = ["sh", "-c", "test -s /runs/*/metrics.jsonl"]


def seconds_to_first_step(checkout: Path, engine: Literal["mock", "vllm"]) -> float:
    """Train a tiny project with the mock, or the checkout's examples/digits with vLLM, until there is a step."""
    with tempfile.TemporaryDirectory() as folder:
        project = checkout / "examples/digits"
        if engine == "mock":
            project = write_project(Path(folder) / "project")
            set_steps(project, 1_000_000)  # it must not end before it is looked at
        stack = Stack(project.resolve(), checkout=checkout, engine=engine)
        try:
            began = time.monotonic()
            trainer = stack.start().container("trainer")
            while trainer.exec_run(HAS_STEP).exit_code:
                trainer.reload()
                assert trainer.status == "running", stack.logs()
                assert time.monotonic() < began + TIMEOUT_S, stack.logs()
                time.sleep(POLL_S)
            return time.monotonic() - began
        finally:
            stack.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--engines", nargs="+", choices=["mock", "vllm"], default=["mock"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    checkouts = {"before": args.before.resolve(), "now": ROOT} if args.before else {"now": ROOT}
    for engine in args.engines:
        times: dict[str, list[float]] = {name: [] for name in checkouts}
        for _ in range(args.rounds):
            for name, checkout in checkouts.items():
                times[name].append(seconds_to_first_step(checkout, engine))
        for name, values in times.items():
            each = ", ".join(f"{value:.1f}" for value in values)
            print(f"up, {engine}, {name}: {statistics.median(values):.1f} s to the first step ({each})", flush=True)


if __name__ == "__main__":
    main()
