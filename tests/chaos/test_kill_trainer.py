"""A trainer that is killed at any moment resumes, and ends with the same parameters as an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from support.episode_projects import TOOLS, settings, with_code
from support.forked import start_trainer
from support.generators import running
from support.models import make_tiny_model
from support.projects import Project, assert_same_course
from tandem_protocol.store import WeightStore

KILLS = 20
STEPS = 60
SEED = int(os.environ.get("TANDEM_CHAOS_SEED", "0"))
TIMEOUT_S = 120.0
START = "start"
START_S = 0.5
PHASES = (START, "wait_for_rollouts", "update", "publish", "checkpoint")
"""Each kill picks one of these phases and a random moment in it. Random times alone would mostly hit the longest."""


PROMPTS: dict[str, Any] = {"limit": 3}
EPISODES = settings(environment="episodes:Echo", **TOOLS)
KINDS: dict[str, dict[str, Any]] = {
    "single_turn": {"eval": {"prompts": PROMPTS, "every_steps": 3}},
    "episodes": EPISODES | {"eval": {"prompts": PROMPTS | EPISODES["prompts"], "every_steps": 3}},
}
"""Settings of `trainer` for each kind of run."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows all characters of the chat template and of the tools' results."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab=75, max_position_embeddings=256)


@pytest.fixture(scope="module", params=["single_turn", pytest.param("episodes", marks=pytest.mark.thorough)])
def trainer(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


@contextmanager
def _project(directory: Path, model: Path, trainer: dict[str, Any]) -> Iterator[Project]:
    """A project with its own generator and store, because the mock's answers depend on the attempts in a store."""
    weights_dir = directory / "weights"
    weights_dir.mkdir(parents=True)
    with running("mock", model, weights_dir, log=directory / "generator.log") as generator:
        project = Project(directory / "project", model, generator, weights_dir, max_steps=STEPS, **trainer)
        yield with_code(project)


def _start(project: Project) -> ForkServerProcess:
    return start_trainer(project.directory / "config.yaml", project.directory / "trainer.log")


def _finish(project: Project) -> None:
    trainer = _start(project)
    trainer.join(TIMEOUT_S)
    assert trainer.exitcode == 0, (project.directory / "trainer.log").read_text()[-3000:]


def _status(project: Project) -> dict[str, Any]:
    """Return the trainer's status.json, or an initial status if there is none yet."""
    file = project.run_dir / "status.json"
    return json.loads(file.read_text()) if file.exists() else {"step": 0, "phase": START, "since_unix_s": 0.0}


def _wait_for_phase(
    project: Project, trainer: ForkServerProcess, phase: str, *, steps: int, began_unix_s: float
) -> None:
    """Wait until this trainer, not the previous one, has completed `steps` steps and is in `phase` of the next."""
    deadline = time.monotonic() + TIMEOUT_S
    first = None
    while time.monotonic() < deadline:
        assert trainer.is_alive(), (project.directory / "trainer.log").read_text()[-3000:]
        status = _status(project)
        if first is None and status["phase"] == "wait_for_rollouts" and status["since_unix_s"] > began_unix_s:
            first = status["step"]
        if first is not None and status["step"] >= first + steps and status["phase"] == phase:
            return
        time.sleep(0.0005)
    raise TimeoutError(f"the trainer did not reach the phase {phase} within {TIMEOUT_S} s")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, trainer: dict[str, Any]) -> Iterator[Project]:
    with _project(tmp_path_factory.mktemp("undisturbed"), model, trainer) as project:
        _finish(project)
        yield project


def test_twenty_kills_at_random_moments_leave_the_final_parameters_unchanged(
    tmp_path: Path, model: Path, trainer: dict[str, Any], undisturbed: Project
):
    print(f"TANDEM_CHAOS_SEED={SEED}")
    chance = random.Random(SEED)
    duration_s = _durations(undisturbed)
    hits: Counter[str] = Counter()
    with _project(tmp_path, model, trainer) as project:
        for kill in range(KILLS):
            phase = chance.choice(PHASES)
            began_unix_s = time.time()
            running_trainer = _start(project)
            if phase != START:
                _wait_for_phase(project, running_trainer, phase, steps=chance.randint(0, 2), began_unix_s=began_unix_s)
            time.sleep(chance.uniform(0, duration_s[phase]))
            running_trainer.kill()
            running_trainer.join(TIMEOUT_S)
            assert running_trainer.exitcode == -signal.SIGKILL, "the trainer ended before it was killed"
            status = _status(project)
            hit = status["phase"] if status["since_unix_s"] > began_unix_s else START
            hits[hit] += 1
            print(f"kill {kill + 1} after {time.time() - began_unix_s:.2f} s: {hit} at step {status['step']}")
        _finish(project)
        assert len(hits) >= 4, f"the kills hit only {dict(hits)}"
        attempts = {line["version"].partition(".")[2] for line in project.lines("metrics.jsonl")}
        assert len(attempts) >= 4, f"only the attempts {attempts} completed a step"
        assert_same_course(project, undisturbed)
        assert _published(project) == _published(undisturbed)


def _durations(project: Project) -> dict[str, float]:
    """Return the mean duration of each phase, in seconds."""
    lines = project.lines("metrics.jsonl")
    phases = {
        name: [line["timings"][f"{name}_s"] for line in lines if line["timings"][f"{name}_s"]] for name in PHASES[1:]
    }
    return {START: START_S} | {name: statistics.fmean(seconds) for name, seconds in phases.items()}


def _published(project: Project) -> tuple[Any, ...]:
    """Return the files of the last version, with their digests."""
    store = WeightStore(project.directory.parent / "weights")
    latest = store.latest()
    assert latest is not None
    assert latest.step == STEPS
    return store.read(latest)[0].files
