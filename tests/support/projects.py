"""Projects that use a running generator, and the trainer as a real process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from support.forked import READ_AT_IMPORT, Forked
from support.generators import TOKEN, Generator, running
from support.models import make_tiny_model
from tandem_trainer.run.checkpoint import read_state, rollouts_file

REWARDS = '''
"""Rewards odd tokens. In rank AT_RANK, call number AT_CALL first performs ACTION: raise, short, hang or a signal."""
import os, signal, time

calls = 0


def odd(completion_ids, **_):
    global calls
    calls += 1
    env = os.environ
    here = calls == int(env.get("AT_CALL", "0")) and env.get("RANK", "0") == env.get("AT_RANK", "0")
    action = env.get("ACTION") if here else None
    if action == "raise":
        raise KeyError("answer")
    if action == "short":
        return [0.0]
    if action == "hang":
        time.sleep(1000)
    if action:
        os.kill(os.getpid(), getattr(signal, action))
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
'''
PROMPTS_PER_STEP = 2
TIMEOUT_S = 300.0
_VARYING = {
    "timings", "publish_timings", "tokens_per_s", "environment_s_mean", "version",
    "replica_tokens", "replica_outstanding",  # by URL, and generators may have other ones
}  # fmt: skip


def write_project(folder: Path) -> Path:
    """Write a project for the tests of the deployment, with a reward that differs between the mock's completions."""
    make_tiny_model(folder / "model")
    config = {
        "shared": {"model": "model"},
        "generator": {"engine": "vllm"},
        "trainer": {
            "max_steps": 4,
            "rewards": [{"function": "odd_rewards:odd"}],
            "rollout": {"num_prompts": PROMPTS_PER_STEP, "num_generations": 4, "max_completion_length": 12},
            "checkpoint": {"every_steps": 2},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    _write_rewards_and_prompts(folder)
    return folder


def _write_rewards_and_prompts(folder: Path) -> None:
    (folder / "odd_rewards.py").write_text(REWARDS)
    rows = ({"prompt": f"{i}+{j}="} for i in range(3) for j in range(3))
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@contextlib.contextmanager
def make_projects(directory: Path, model: Path) -> Iterator[Callable[..., Project]]:
    """Create projects, each with its own mock generator and store: two runs cannot share one, as attempts would mix."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "project", faults: tuple[str, ...] = (), **trainer: Any) -> Project:
            weights_dir = directory / name / "weights"
            weights_dir.mkdir(parents=True)
            log = directory / name / "generator.log"
            generator = stack.enter_context(running("mock", model, weights_dir, *faults, log=log))
            return Project(directory / name / "project", model, generator, weights_dir, **trainer)

        yield make


class Project:
    """A folder with config, rewards and prompts. Reward call 2k + 1 is the first of step k, which has two prompts."""

    def __init__(self, directory: Path, model: Path, generator: Generator, weights_dir: Path, **trainer: Any) -> None:
        self.directory = directory
        self.generator = generator
        self.max_lag = trainer.get("max_lag", 0)
        self.forks = True
        """Whether trainers are forked, which saves the seconds of their imports. False for tests of the start."""
        directory.mkdir(parents=True)
        config = {
            "shared": {
                "model": str(model),
                "weights_dir": str(weights_dir),
                "generators": [f"http://127.0.0.1:{generator.port}"],
            },
            "trainer": {
                "max_steps": 5,
                "max_lag": 0,
                "rewards": [{"function": "odd_rewards:odd"}],
                "rollout": {"num_prompts": PROMPTS_PER_STEP, "num_generations": 4, "max_completion_length": 12},
                "optim": {"learning_rate": 1e-3},
                "checkpoint": {"every_steps": 2},
            }
            | trainer,
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        _write_rewards_and_prompts(directory)

    def train(self, *arguments: str, ranks: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the trainer in `ranks` processes until it ends."""
        config = str(self.directory / "config.yaml")
        command = [sys.executable, "-m", "tandem_trainer.launch", "--config", config, *arguments]
        whole = {**os.environ, "TANDEM_TOKEN": TOKEN, "TANDEM_TRAINER_PROCESSES": str(ranks), **env}
        if not self.forks or any(name.startswith(READ_AT_IMPORT) for name in env):
            return subprocess.run(
                command, env=whole, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            process = Forked(command, whole, stdout, stderr)
            try:
                status = process.wait(TIMEOUT_S)
            finally:
                process.end()
            for file in (stdout, stderr):
                file.seek(0)
            return subprocess.CompletedProcess(command, status, stdout.read(), stderr.read())

    @property
    def run_dir(self) -> Path:
        return self.directory / "runs" / "default"

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / name).read_text().splitlines()]

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines("metrics.jsonl")]

    def rollouts(self, step: int) -> dict[str, Any]:
        """Return the rollouts of rank 0 in the checkpoint of `step`."""
        checkpoint = self.run_dir / "checkpoints" / f"{step:06d}"
        name = rollouts_file(0, read_state(checkpoint)["rewrites"])
        return json.loads((checkpoint / name).read_text())  # it is an object

    def parameters(self, step: int) -> dict[str, Tensor]:
        """Return the parameters in the checkpoint of `step`."""
        files = (self.run_dir / "checkpoints" / f"{step:06d}" / "model").glob("*.safetensors")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


def course(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` without the figures that differ between two runs with the same results."""
    return [{key: value for key, value in line.items() if key not in _VARYING} for line in lines]


def assert_same_course(ours: Project, theirs: Project) -> None:
    """Assert that two runs end with bitwise equal parameters and have the same metrics for every step."""
    assert ours.steps == theirs.steps == [*range(1, len(theirs.steps) + 1)]
    last = theirs.steps[-1]
    got = ours.parameters(last)
    expected = theirs.parameters(last)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert course(ours.lines("metrics.jsonl")) == course(theirs.lines("metrics.jsonl"))
