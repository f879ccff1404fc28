"""The chart's environment pod in podman: the trainer plays its episodes there, also after the pod was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import models, podman
from support.episode_projects import CODE, settings
from support.helm import CHART, render
from support.podman import cluster
from support.runs import Run
from support.stack import Stack

pytestmark = [pytest.mark.docker, pytest.mark.helm, pytest.mark.podman]

TIMEOUT_S = 180.0
STEPS = 12
MAKE_MODEL = "make_tiny_model(Path('model'), vocab=75, max_position_embeddings=256)"
PREPARE = f"{Path(models.__file__).read_text()}\n\n{MAKE_MODEL}\n"
SLOW = '''

class SlowEcho(Echo):
    """Gives the test time to kill the pod."""

    async def step(self, message):
        import asyncio

        await asyncio.sleep(0.1)
        return await super().step(message)
'''
LOOK = """
import json, os
found = [os.listdir(path) for path in ("/weights", "/secrets", "/environment-secrets")]
print(json.dumps([os.getuid(), *found]))
"""


def values() -> dict[str, Any]:
    trainer = {"max_steps": STEPS, "log_completions": 8, "rewards": [], **settings(environment="episodes:SlowEcho")}
    trainer["eval"] = {"prompts": trainer["prompts"]}
    prompts = "".join(f"{json.dumps({'prompt': f'{a}+{b}='})}\n" for a in range(5) for b in range(5))
    files = {"prepare.py": PREPARE, "episodes.py": CODE + SLOW}
    return {
        "config": {"trainer": trainer},
        "project": {"files": {**files, "prompts.jsonl": prompts, "held_out.jsonl": prompts}},
        "generator": {"replicas": 1},
        "environment": {"enabled": True},
    }


@pytest.fixture(scope="module")
def run(mock_pods: None) -> Iterator[Run]:
    """A finished run whose environment was killed after the first step."""
    Stack(variables={"COMPOSE_PROFILES": "environment"}).must("build", "environment", timeout_s=1800)
    podman.load_images("tandem-environment:environment")
    with cluster() as made:
        run = Run(made, render(values(), of=CHART / "ci/mock-values.yaml"))
        run.start(timeout_s=TIMEOUT_S)
        run.reach(1)
        (environment,) = run.environments
        made.kill(environment)
        assert run.end(timeout_s=TIMEOUT_S) == [0], run.logs()
        yield run


def test_the_episodes_are_played_in_the_pod_and_the_run_survives_its_death(run: Run) -> None:
    assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
    (environment,) = run.environments
    assert run.cluster.inspect(environment)["RestartCount"] == 1
    lines = (run.run_dir / "rollouts.jsonl").read_text().splitlines()
    episodes = [json.loads(line) for line in lines]
    of_last = [one for one in episodes if one["step"] == STEPS]
    assert {one["status"] for one in of_last} <= {"finished", "max_tokens", "max_turns"}
    assert max(one["turns"] for one in of_last) > 1


def test_the_pod_has_no_weights_writes_nothing_but_tmp_and_knows_its_own_token_only(run: Run) -> None:
    (environment,) = run.environments
    assert json.loads(run.cluster.python(environment, LOOK)) == [10001, [], [], ["token"]]
    assert [run.refusal(environment, path) for path in ("/cache/x", "/opt/x", "/tmp/x")] == ["EROFS", "EROFS", "none"]
    assert run.token not in json.dumps(run.cluster.inspect(environment))
