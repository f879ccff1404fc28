"""Compare the seconds per step that `tandem plan` predicts with those of real runs.

    python tests/bench/plan.py [--engines mock vllm] [--steps 20]

The costs come from two runs with `max_lag` 0. With the mock, these have one and two replicas, and completions have a
long tail. With vLLM, there is one generator, and the runs have 8 and 16 groups. The plan then predicts all runs.
Generators share one CPU, and the trainer has another one.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, options, train, write
from support.generators import running
from support.models import make_tiny_model
from tandem_cli.plan.costs import make_costs
from tandem_cli.plan.measured import generators_speed, read_run
from tandem_cli.plan.simulation import simulate

GENERATIONS, LONGEST, TOKEN_LATENCY_S = 8, 128, 0.01


class Case(NamedTuple):
    replicas: int
    prompts: int
    max_lag: int

    @property
    def is_measured(self) -> bool:
        return self.max_lag == 0


CASES = {
    "mock": [Case(replicas, 8, lag) for replicas in (1, 2) for lag in (0, 1, 4)],
    "vllm": [*(Case(1, 8, lag) for lag in (0, 1, 4)), *(Case(1, 16, lag) for lag in (0, 1))],
}


def script(folder: Path) -> Path:
    """Write a script for the mock with lognormal lengths."""
    chance = random.Random(0)
    lengths = [min(LONGEST - 1, max(1, round(chance.lognormvariate(2.7, 1.0)))) for _ in range(1024)]
    path = folder / "script.jsonl"
    path.write_text(
        json.dumps({"samples": [[[chance.randrange(3, 60) for _ in range(one)]] for one in lengths]}) + "\n"
    )
    return path


def run_cases(engine: str, cases: list[Case], steps: int, folder: Path) -> list[Path]:
    """Train once per case, and return the folders of the runs."""
    cpus = sorted(os.sched_getaffinity(0))
    model = make_tiny_model(folder / "model", max_position_embeddings=512)
    words = ["--generator.mock.script", str(script(folder))]
    words += ["--generator.mock.faults.token_latency_s", str(TOKEN_LATENCY_S)]
    runs, numbers = [], count()
    for replicas in sorted({case.replicas for case in cases}):
        with ExitStack() as stack:
            os.sched_setaffinity(0, cpus[:1])  # the generators inherit it
            weights = folder / f"weights-{replicas}"
            ports = [
                stack.enter_context(
                    running(
                        engine,
                        model,
                        weights,
                        *(words if engine == "mock" else ()),
                        log=folder / f"{next(numbers)}.log",
                    )
                ).port
                for _ in range(replicas)
            ]
            os.sched_setaffinity(0, cpus)
            for case in (case for case in cases if case.replicas == replicas):
                rollout = {
                    "num_prompts": case.prompts,
                    "num_generations": GENERATIONS,
                    "max_completion_length": LONGEST,
                }
                name = folder / f"run-{next(numbers)}"
                limits: dict[str, Any] = {"max_steps": steps, "max_lag": case.max_lag}
                runs.append(
                    train(name, model, weights, ports, cpus=cpus[-1:], rollout=rollout, log_completions=16, **limits)
                )
    return runs


def compare(engine: str, cases: list[Case], steps: int, folder: Path) -> Table:
    """Predict the time of each run with the costs of those without lag."""
    measured = [read_run(run, 1) for run in run_cases(engine, cases, steps, folder)]
    without_lag = [run for run, case in zip(measured, cases, strict=True) if case.is_measured]
    speed = generators_speed(without_lag, {})
    rows = []
    for case, run in zip(cases, measured, strict=True):
        same = next(one for one in without_lag if one.values["num_prompts"] == case.prompts)
        costs = make_costs({**same.values, **speed}, same.name)
        predicted_s = simulate(costs, run.split).step_s
        error = f"{predicted_s / run.step_s - 1:+.0%}"
        figures = [f"{run.step_s:.2f}", f"{predicted_s:.2f}", error, "yes" if case.is_measured else ""]
        rows.append([str(case.replicas), str(case.prompts), str(case.max_lag), *figures])
    found = ", ".join(f"{name} {value:.3g}" for name, value in speed.items())
    columns = ["replicas", "groups", "`max_lag`", "measured s per step", "predicted", "error", "used for the costs"]
    return Table(title=f"tandem plan and real runs, {engine}", columns=columns, rows=rows, note=f"Found: {found}.")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--engines", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    tables = []
    for engine in args.engines[:1] if args.quick else args.engines:
        cases = CASES[engine][:2] if args.quick else CASES[engine]
        with tempfile.TemporaryDirectory() as folder:
            tables.append(compare(engine, cases, 6 if args.quick else args.steps, Path(folder)))
    write(tables, args.result)


if __name__ == "__main__":
    main()
