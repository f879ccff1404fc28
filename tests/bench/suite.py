"""Run the benches one after the other, each in a process of its own, and write docs/benchmarks.md.

    make bench                      # all, about 66 minutes on two cores
    make bench BENCH=publishing     # one; the page keeps the other figures
    make bench ARGS=--quick         # a try of all, which prints and writes nothing

What a bench prints is in the log beside its result, so that figures are not lost among the lines of an engine.
docs/benchmarks.json has the results, and the page is made of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from pydantic import BaseModel

from support.bench import Table

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/benchmarks.md"
TIMEOUT_S = 2400
ESTIMATE = "about 66 minutes on two quiet cores"


class Bench(NamedTuple):
    script: str
    text: str
    """What is measured, and how."""
    arguments: tuple[str, ...] = ()


BENCHES = {
    "generation": Bench(
        "rollouts.py",
        "Tokens per second of `POST /rollouts`, of the same vLLM engine called in its own process, and of "
        "`/v1/completions` of `vllm serve` in another process. All return logprobs. The model is tiny.",
    ),
    "publishing": Bench(
        "publish.py",
        "Seconds until vLLM serves a new version, against a plain write and read of the same bytes, and against "
        "`save_pretrained` with vLLM's own `reload_weights`. The folder is in memory. Models have random weights.",
    ),
    "loop": Bench(
        "trl.py",
        "The whole loop with the same task, model, batch, dtype and cores: Tandem's trainer, and TRL 1.16's "
        "`GRPOTrainer` with a vLLM server (through `trl.use()`) and without vLLM. With `max_lag` of 1 or more, "
        "generator and trainer have half of the cores each. Sides whose services take turns have all cores. TRL's own "
        "vLLM server was not run: it gets weights over NCCL, which needs GPUs. `trl.use()` with our generator stands "
        "for it.",
    ),
    "replicas": Bench(
        "mock.py",
        "Completions per second of one client with 1, 2 and 4 mock generators. Each has the same number of requests in "
        "flight, and takes 10 ms per token.",
    ),
    "memory": Bench("memory.py", "The peak memory of each process, while a tiny model is trained."),
    "update": Bench(
        "trainer.py",
        "One update beside TRL 1.16, with one thread and random weights. `trl` has TRL's defaults. `trl-cut` has one "
        "row per pass without checkpointing, as Tandem does.",
        ("--models", "small", "--rounds", "2", "--shapes", "32+512", "512+128"),
    ),
    "queue": Bench(
        "rollout_queue.py",
        "Samples per second if completions have a long tail, with two mock generators and updates of 0.1 s. Fixed "
        "batches wait for the slowest group of each step.",
    ),
    "sessions": Bench("sessions.py", "Episodes of 4 turns, all at once, against four mock generators."),
    "plan": Bench("plan.py", "[`tandem plan`](deploy/planning.md) against real runs on one machine."),
}


class Run(BaseModel):
    """A result, and where it was measured."""

    tables: list[Table]
    date: str
    machine: str
    load: float
    """Load average when the bench began."""
    seconds: float


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def run(name: str, folder: Path, *, quick: bool) -> Run:
    """Run a bench.

    Raises:
        SystemExit: it failed. The message has the end of its log.
    """
    bench, result, log = BENCHES[name], folder / f"{name}.json", folder / f"{name}.log"
    words = [HERE / bench.script, "--result", result, *bench.arguments, *(["--quick"] if quick else [])]
    load, began_s = os.getloadavg()[0], time.monotonic()
    with log.open("w") as file:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{log.read_text()[-3000:]}")
    return Run(
        tables=json.loads(result.read_text()),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        machine=machine(),
        load=load,
        seconds=time.monotonic() - began_s,
    )


def section(name: str, result: Run) -> str:
    tables = "\n".join(table.markdown() for table in result.tables)
    where = (
        f"{result.date}, {result.machine}, load average {result.load:.1f} at the beginning, {result.seconds:.0f} s. "
        f"`make bench BENCH={name}`"
    )
    return f"## {name.capitalize()}\n\n{BENCHES[name].text}\n\n{tables}\n{where}\n"


def missing(name: str) -> str:
    return f"## {name.capitalize()}\n\n{BENCHES[name].text}\n\nNot measured yet: `make bench BENCH={name}`.\n"


def page(results: dict[str, Run]) -> str:
    """Return the page with the results that there are."""
    is_complete = results.keys() == BENCHES.keys()
    minutes = sum(result.seconds for result in results.values()) / 60
    took = f"All of it took {minutes:.0f} minutes." if is_complete else f"All of it takes {ESTIMATE} (an estimate)."
    head = (
        "# Benchmarks\n\n"
        "Written by `make bench`, which runs the scripts in `tests/bench`. The sides of a comparison take turns in one "
        "run, and a ratio is one of medians, unless the note of a table says otherwise. Other measurements, such as "
        "those on a GPU, are in [Measurements](reference/measured.md).\n\n"
        f"{took}\n"
    )
    sections = (section(name, results[name]) if name in results else missing(name) for name in BENCHES)
    return "\n".join([head, *sections])


def read(path: Path) -> dict[str, Run]:
    values = json.loads(path.read_text()) if path.exists() else {}
    return {name: Run.model_validate(value) for name, value in values.items()}


def save(results: dict[str, Run], target: Path) -> None:
    """Write the page, and beside it the results of which it is made."""
    values = {name: result.model_dump() for name, result in results.items()}
    target.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    target.write_text(page(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument(
        "--quick", action="store_true", help="try all, and print the figures instead of writing the page"
    )
    args = parser.parse_args()
    target = None if args.quick else PAGE
    results = read(target.with_suffix(".json")) if target else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            results[name] = run(name, Path(folder), quick=args.quick)
            print(section(name, results[name]), flush=True)
            if target:
                save(results, target)  # after each, so that an interrupted run keeps what it has


if __name__ == "__main__":
    main()
