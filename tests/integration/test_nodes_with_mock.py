"""A run on two nodes, each with one trainer process: one of them is stopped, killed or replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.generators import TOKEN
from support.ports import free_port
from support.projects import Project, assert_same_course, make_projects

pytestmark = pytest.mark.slow

TIMEOUT_S = 120.0
STEPS = 24
STOPPED = 143


@pytest.fixture(scope="module")
def make_project(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Callable[[str], Project]]:
    with make_projects(tmp_path_factory.mktemp("projects"), model) as make:
        yield lambda name: make(name, max_steps=STEPS, checkpoint={"every_steps": 5}, prompts={"shuffle": False})


class Pair:
    """Two launchers, as on two nodes."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.port = free_port()
        self.log = (project.directory / "trainers.log").open("a")
        self.nodes = [self.start(0), self.start(1)]

    def start(self, rank: int) -> subprocess.Popen[str]:
        env = {
            "TANDEM_TOKEN": TOKEN,
            "TANDEM_TRAINER_NODES": "2",
            "TANDEM_TRAINER_NODE_RANK": str(rank),
            "TANDEM_TRAINER_RENDEZVOUS": f"127.0.0.1:{self.port}",
        }
        command = [
            sys.executable,
            "-m",
            "tandem_trainer.launch",
            "--config",
            str(self.project.directory / "config.yaml"),
        ]
        return subprocess.Popen(command, env={**os.environ, **env}, stdout=self.log, stderr=self.log, text=True)

    def reach(self, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not (self.project.run_dir / "metrics.jsonl").exists() or self.project.steps[-1:] < [step]:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def end(self) -> list[int]:
        return [node.wait(TIMEOUT_S) for node in self.nodes]

    @property
    def output(self) -> str:
        return (self.project.directory / "trainers.log").read_text()


def test_stopped_and_killed_nodes_end_together_and_the_run_goes_on_bit_for_bit(
    make_project: Callable[[str], Project],
):
    undisturbed = Pair(make_project("undisturbed"))
    assert undisturbed.end() == [0, 0], undisturbed.output
    disturbed = make_project("disturbed")

    pair = Pair(disturbed)
    pair.reach(4)
    pair.nodes[1].terminate()
    assert pair.end() == [STOPPED, STOPPED], pair.output

    pair = Pair(disturbed)
    pair.reach(disturbed.steps[-1] + 4)
    pair.nodes[0].kill()
    replacement = pair.start(0)  # before the other one has ended, as a Job may do
    lost, left = pair.end()
    assert lost == -signal.SIGKILL
    assert left not in (0, STOPPED), "Kubernetes counts it as a failure"

    pair.nodes = [replacement, pair.start(1)]
    assert pair.end() == [0, 0], pair.output
    assert "Traceback" not in pair.output
    assert_same_course(disturbed, undisturbed.project)


def test_a_node_that_hangs_and_is_replaced_ends_the_other(make_project: Callable[[str], Project]):
    pair = Pair(make_project("hanging"))
    pair.reach(2)
    pair.nodes[1].send_signal(signal.SIGSTOP)
    children = Path(f"/proc/{pair.nodes[1].pid}/task/{pair.nodes[1].pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    replacement = pair.start(1)
    try:
        assert pair.nodes[0].wait(TIMEOUT_S) == 1, pair.output
        assert replacement.poll() is None, "it waits for the next node 0"
    finally:
        replacement.terminate()
        pair.nodes[1].kill()
    assert replacement.wait(TIMEOUT_S) in (STOPPED, -signal.SIGTERM)
