"""Compare the whole loop: Tandem's trainer at three lags, and TRL's GRPOTrainer with and without a vLLM server.

    python tests/bench/trl.py [--tasks digits smollm2] [--rounds 1]

All sides have the same model, prompts, rewards, batch, lengths, optimizer and float32. They take turns, after a step
with each generator that does not count. CPUs are divided as `tandem demo` and `tandem run` do it: if generator and
trainer work at the same time, each has half of them, and else both have all. TRL without vLLM has all. "TRL with vLLM"
is a TRL script on `trl.use()`: TRL's own server sends weights over NCCL, which needs GPUs.

Times are means over all steps: a queue that fills at the beginning would flatter the later ones. They leave out
evaluation, checkpoints, and what comes before the first step. The task "digits" also says how long it takes until the
mean reward of five steps is 0.9.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import trl
from support.bench import REWARDS, ROWS, Table, options, records, run_on, train, write
from support.generators import TOKEN, Generator, running
from support.smollm2 import make_smollm2
from tandem_cli.processes import choose_cpus

ROOT = Path(__file__).parents[2]
SCRIPT = Path(trl.__file__).with_name("trl_timed.py")
GOAL, WINDOW = 0.9, 5
Steps = list[dict[str, float]]
"""Step → seconds, reward and tokens per completion. Of Tandem also the seconds of waiting for the publishing."""


class Task(NamedTuple):
    model: Path
    data: Path
    """prompts.jsonl, beside rewards.py."""
    function: str
    trainer: dict[str, Any]
    """Settings of Tandem's trainer."""
    max_model_len: int

    @property
    def samples(self) -> int:
        rollout = self.trainer["rollout"]
        return int(rollout["num_prompts"] * rollout["num_generations"])

    def trl_options(self) -> dict[str, Any]:
        """The same settings for TRL. Its loss and its other defaults are ours."""
        rollout = self.trainer["rollout"]
        optim = {key: value for key, value in self.trainer["optim"].items() if key != "name"}
        return {
            "max_steps": self.trainer["max_steps"],
            "per_device_train_batch_size": self.samples,
            "num_generations": rollout["num_generations"],
            "max_completion_length": rollout["max_completion_length"],
            **optim,
        }


def digits(folder: Path, *, quick: bool) -> Task:
    """examples/digits, without evaluation."""
    example = ROOT / "examples/digits"
    for name in ("prepare.py", "rewards.py"):
        shutil.copy(example / name, folder)
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, timeout=300)
    config = yaml.safe_load((example / "config.yaml").read_text())
    settings, max_model_len = config["trainer"], config["generator"]["max_model_len"]
    trainer = {key: settings[key] for key in ("max_steps", "rollout", "optim")} | ({"max_steps": 4} if quick else {})
    return Task(folder / "model", folder / "prompts.jsonl", "exact_match", trainer, max_model_len)


def smollm2(folder: Path, *, quick: bool) -> Task:
    """SmolLM2-135M with completions of up to 128 tokens."""
    model = make_smollm2(folder)
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (folder / "rewards.py").write_text(REWARDS)
    rollout = {"num_prompts": 2, "num_generations": 4, "max_completion_length": 8 if quick else 128}
    trainer = {"max_steps": 3 if quick else 4, "rollout": rollout, "optim": {"learning_rate": 1e-6}}
    return Task(model, folder / "prompts.jsonl", "distinct", trainer, max_model_len=256)


TASKS = {"digits": digits, "smollm2": smollm2}


class Sides:
    """The ways to train on a task. Each call has a folder of its own.

    Args:
        generators: One with half of the CPUs, and one with all.
    """

    def __init__(self, task: Task, folder: Path, generators: dict[bool, Generator], cpus: list[int]) -> None:
        self._task, self._folder, self._generators, self._cpus = task, folder, generators, cpus
        self._names = (folder / str(number) for number in count())
        self.all: dict[str, Callable[[], Steps]] = {
            "Tandem, `max_lag: 1`": partial(self.tandem, 1),
            "Tandem, `max_lag: 0`": partial(self.tandem, 0),
            "Tandem, `max_lag: 4`": partial(self.tandem, 4),
            "TRL with vLLM": partial(self.trl, with_vllm=True),
            "TRL without vLLM": partial(self.trl, with_vllm=False),
        }

    def warm_up(self) -> None:
        """Make a step with each generator: vLLM compiles parts of itself at the first one."""
        for max_lag in (0, 1):
            self.tandem(max_lag, max_steps=1)

    def tandem(self, max_lag: int, **more: Any) -> Steps:
        task, take_turns = self._task, max_lag == 0
        trainer = {**task.trainer, "max_lag": max_lag, **more}
        run = train(
            next(self._names),
            task.model,
            self._folder / "weights",
            [self._generators[take_turns].port],
            cpus=choose_cpus(self._cpus, take_turns=take_turns)[1],
            rewards=(task.data.parent / "rewards.py").read_text(),
            function=task.function,
            rows=[json.loads(line) for line in task.data.read_text().splitlines()],
            **trainer,
        )
        return [
            {
                "seconds": sum(line["timings"].values()) - line["timings"]["checkpoint_s"],
                "reward": line["reward_mean"],
                "publish": line["timings"]["publish_s"],
                "tokens": line["completion_tokens_mean"],
            }
            for line in records(run)
        ]

    def trl(self, *, with_vllm: bool) -> Steps:
        folder = next(self._names)
        folder.mkdir()
        url = f"http://tandem:{TOKEN}@127.0.0.1:{self._generators[True].port}"
        server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url} if with_vllm else {}
        task = self._task
        given = {"model": task.model, "data": task.data, "function": task.function, "out": folder / "out"}
        specification = json.dumps(
            {key: str(value) for key, value in given.items()} | {"options": task.trl_options() | server}
        )
        launcher = ["-m", "tandem_trainer.trl"] if with_vllm else ["-P"]
        weights = str(self._folder / "weights")
        run_on(self._cpus, [trl.NEWEST, *launcher, SCRIPT, specification], folder, TANDEM__SHARED__WEIGHTS_DIR=weights)
        return list(json.loads((folder / "out/steps.json").read_text()))


def seconds_to_goal(steps: Steps) -> float | None:
    """Return the seconds until the mean reward of WINDOW steps is GOAL. None: never."""
    for end in range(WINDOW, len(steps) + 1):
        if statistics.fmean(step["reward"] for step in steps[end - WINDOW : end]) >= GOAL:
            return sum(step["seconds"] for step in steps[:end])
    return None


def measure(name: str, rounds: int, folder: Path, *, quick: bool) -> Table:
    """Measure all sides on a task, and return the table."""
    (folder / "task").mkdir()
    task = TASKS[name](folder / "task", quick=quick)
    cpus = sorted(os.sched_getaffinity(0))
    words = ("--max-model-len", str(task.max_model_len), "--max-num-seqs", "256")
    measured: dict[str, list[Steps]] = {}
    with ExitStack() as stack:
        generators = {}
        for take_turns in (False, True):
            os.sched_setaffinity(0, choose_cpus(cpus, take_turns=take_turns)[0])  # the generator inherits it
            log = folder / f"generator-{take_turns}.log"
            started = running("vllm", task.model, folder / "weights", *words, log=log)
            generators[take_turns] = stack.enter_context(started)
        os.sched_setaffinity(0, cpus)
        sides = Sides(task, folder, generators, cpus)
        sides.warm_up()
        for _ in range(rounds):
            for side, call in sides.all.items():
                measured.setdefault(side, []).append(call())
    means = {
        side: statistics.median(statistics.fmean(step["seconds"] for step in steps) for steps in runs)
        for side, runs in measured.items()
    }
    first = next(iter(means))
    rows = []
    for side, runs in measured.items():
        tokens = statistics.fmean(step["tokens"] for step in runs[0])
        goals = [seconds_to_goal(steps) for steps in runs]
        reached = [f"{one:.0f}" if one else "not reached" for one in goals] if name == "digits" else ["-"]
        figures = (f"{means[side]:.2f}", f"{task.samples / means[side]:.1f}", f"{means[first] / means[side]:.2f}")
        last = ", ".join(f"{statistics.fmean(step['reward'] for step in steps[-WINDOW:]):.3f}" for steps in runs)
        waits = [100 * step["publish"] / step["seconds"] for steps in runs for step in steps if "publish" in step]
        wait = f"{statistics.fmean(waits):.1f} %" if waits else "-"
        rows.append([side, *figures, wait, f"{tokens:.0f}", ", ".join(reached), last if name == "digits" else "-"])
    note = (
        f"A time is the median of {rounds} rounds."
        if rounds > 1
        else "Each side ran once, one after the other, so a ratio is one of two runs."
    )
    if name != "digits":
        note += (
            f" There are {task.trainer['max_steps']} steps, and the reward counts different characters, so no time to "
            "a reward of 0.9 is given."
        )
    columns = ["side", "s per step", "samples/s", f"{first} ÷ this", "waits for publishing", "tokens per completion",
               "s to a reward of 0.9", f"reward of the last {WINDOW} steps"]  # fmt: skip
    title = f"{name}: {task.samples} samples of up to {task.trainer['rollout']['max_completion_length']} tokens"
    return Table(title=title, columns=columns, rows=rows, note=note)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    if why := trl.missing():
        raise SystemExit(f"the environment of TRL is missing: {why}")
    tables = []
    for name in args.tasks:
        with tempfile.TemporaryDirectory() as folder:
            tables.append(measure(name, args.rounds, Path(folder), quick=args.quick))
    write(tables, args.result)


if __name__ == "__main__":
    main()
