"""`docker compose up` with vLLM on the CPU: examples/digits learns, and so does the TRL example with the same model."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest
import yaml

from support.stack import ROOT, stack

STEPS = 50
pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.usefixtures("cpu_images"),
]


class Learned(NamedTuple):
    """A finished run of examples/digits."""

    rewards: list[float]
    initial: Path
    """The initial model, which prepare.py created."""


def copied(example: str, folder: Path) -> Path:
    files = shutil.ignore_patterns("model", "runs", "__pycache__")
    return Path(shutil.copytree(ROOT / "examples" / example, folder / example, ignore=files))


def learns(rewards: list[float]) -> bool:
    return mean(rewards[-10:]) > mean(rewards[:10]) + 0.3


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    folder = tmp_path_factory.mktemp("learned")
    project = copied("digits", folder)
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["trainer"]["max_steps"] = STEPS
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    with stack(project, engine="vllm") as made:
        made.must("up", "--no-build", "--exit-code-from", "trainer", timeout_s=1800)
        made.must("cp", "trainer:/project/model", str(folder / "initial"))
        return Learned([record["reward_mean"] for record in made.metrics()], folder / "initial")


def test_the_stack_learns_and_ends(learned: Learned) -> None:
    assert len(learned.rewards) == STEPS
    assert learns(learned.rewards)


def test_the_unmodified_script_of_trl_learns(learned: Learned, tmp_path: Path) -> None:
    project = copied("trl", tmp_path)
    shutil.copytree(learned.initial, project / "model")  # prepare.py would create the same in most of a minute
    with stack(project, engine="vllm", variables={"TANDEM_SCRIPT": "train.py --max_steps 45"}) as made:
        made.must("build", "trainer", timeout_s=600)
        made.must("up", "--no-build", "--exit-code-from", "trainer", timeout_s=600)
        rewards = [record["reward_mean"] for record in made.metrics()]
    assert len(rewards) == 45
    assert learns(rewards)
