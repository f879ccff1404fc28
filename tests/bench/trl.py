"""Compare seconds per step of a TRL script on Tandem's client, on TRL's own client, and of Tandem's own trainer.

    python tests/bench/trl.py [--steps 12] [--rounds 2]

All use one vLLM generator, one after the other, with the same tiny model, prompts, batch and lengths, in float32. The
generator and the trainers have a CPU each, if there are two. The sides alternate in rounds; a figure is the median over
the steps of all rounds, without the first two steps of each. All sides send the same requests, and the generator's CPU
time per step shows whether they cost it the same. Seconds per step also count the time that other programs took.

TRL's own client only samples: it sends weights over NCCL, which Tandem's generator refuses. So it is compared with
Tandem's client without the time to publish, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import trl
from support.generators import TOKEN, Generator, running
from support.models import make_tiny_model

ROWS, GENERATIONS, LENGTH, WARM_UP = 64, 8, 64, 2
SUPPORT = Path(trl.__file__).parent
Steps = list[dict[str, float]]
"""Step → what was measured: seconds, in all and per phase, and tokens per completion."""


class Bench:
    """A generator, and the ways to train with it. Each call has a folder of its own."""

    def __init__(self, folder: Path, model: Path, generator: Generator, steps: int, cpu: int) -> None:
        self._folder, self._model, self._generator, self._steps, self._cpu = folder, model, generator, steps, cpu
        self._calls = 0

    def script(self, launcher: Sequence[str]) -> Steps:
        """Run the TRL script. With Tandem's client, the steps have its phases."""
        folder = self._new_folder()
        url = f"http://tandem:{TOKEN}@127.0.0.1:{self._generator.port}"
        words = [self._model, url, folder / "out", self._steps, ROWS, LENGTH]
        self._run(folder, [trl.NEWEST, *launcher, SUPPORT / "trl_timed.py", *words])
        told = json.loads((folder / "out/steps.json").read_text())
        steps = [dict(zip(("seconds", "tokens"), pair, strict=True)) for pair in zip(*told.values(), strict=True)]
        phases = _records(folder / "runs/trl_timed") or [{"timings": {}}] * len(steps)
        return [step | record["timings"] for step, record in zip(steps, phases, strict=True)]

    def own_trainer(self, max_lag: int) -> Steps:
        """Run Tandem's trainer."""
        folder = self._new_folder()
        rows = ({"prompt": f"{n}+{n}="} for n in range(10, 99))
        (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (folder / "rewards.py").write_text(
            "def distinct(completions, **columns):\n    return [float(len(set(c))) for c in completions]\n"
        )
        rollout = {"num_prompts": ROWS // GENERATIONS, "num_generations": GENERATIONS, "max_completion_length": LENGTH}
        config = {
            "shared": {
                "model": str(self._model),
                "weights_dir": str(self._folder / "weights"),
                "generators": [f"http://127.0.0.1:{self._generator.port}"],
            },
            "trainer": {
                "max_steps": self._steps,
                "max_lag": max_lag,
                "rewards": [{"function": "rewards:distinct"}],
                "rollout": rollout,
                "checkpoint": {"every_steps": self._steps},
            },
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self._run(folder, [sys.executable, "-m", "tandem_trainer", "--config", folder / "config.yaml"])
        return [
            {
                "seconds": sum(record["timings"].values()) - record["timings"]["checkpoint_s"],
                "tokens": record["completion_tokens_mean"],
                **record["timings"],
            }
            for record in _records(folder / "runs/default")
        ]

    def _new_folder(self) -> Path:
        self._calls += 1
        folder = self._folder / str(self._calls)
        folder.mkdir()
        return folder

    def _run(self, folder: Path, command: Sequence[object]) -> None:
        environment = {"TANDEM_TOKEN": TOKEN, "TANDEM__SHARED__WEIGHTS_DIR": str(self._folder / "weights")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            ["taskset", "--cpu-list", str(self._cpu), *map(str, command)],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def _records(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def cpu_s(generator: Generator) -> float:
    """Return the CPU time of a generator and its processes, in seconds."""
    process = psutil.Process(generator.process.pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def report(measured: dict[str, Steps]) -> None:
    """Print the medians, and the ratios of the first side to the others."""
    medians = {
        name: {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        for name, steps in measured.items()
    }
    for name, median in medians.items():
        phases = {key: value for key, value in median.items() if key.endswith("_s") and value >= 0.0005}
        parts = ", ".join(f"{key.removesuffix('_s').replace('_', ' ')} {value:.3f}" for key, value in phases.items())
        print(f"{name:24} {median['seconds']:.3f} s per step, {median['tokens']:.0f} tokens per completion; {parts}")
    ours, own, *trainers = medians
    sampling = medians[ours]["seconds"] - medians[ours]["publish_s"]
    print(f"{ours} without publishing ÷ {own} = {sampling / medians[own]['seconds']:.2f}")
    for name in trainers:
        print(f"{ours} ÷ {name} = {medians[ours]['seconds'] / medians[name]['seconds']:.2f}")


def main(steps: int, rounds: int) -> None:
    if why := trl.missing():
        print(f"left out: {why}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_model(folder / "model", max_position_embeddings=512)
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[:1])  # the generator inherits it
        with running("vllm", model, folder / "weights", log=folder / "generator.log") as generator:
            bench = Bench(folder, model, generator, steps, cpus[-1])
            sides: dict[str, Callable[[], Steps]] = {
                "TRL, trl.use()": lambda: bench.script(["-m", "tandem_trainer.trl"]),
                "TRL, its own client": lambda: bench.script(["-P", str(SUPPORT / "trl_without_nccl.py")]),
                "Tandem, max_lag 0": lambda: bench.own_trainer(0),
                "Tandem, max_lag 1": lambda: bench.own_trainer(1),
            }
            measured: dict[str, Steps] = {name: [] for name in sides}
            for _ in range(rounds):
                for name, side in sides.items():
                    before_s = cpu_s(generator)
                    rows = side()
                    generator_s = (cpu_s(generator) - before_s) / len(rows)
                    measured[name] += [{**row, "generator_cpu_s": generator_s} for row in rows[WARM_UP:]]
            report(measured)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    main(given.steps, given.rounds)
