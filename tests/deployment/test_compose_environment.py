"""The Compose profile `environment`: episodes take place in a container that has nothing to lose."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml

from support.episode_projects import CODE, settings
from support.models import make_tiny_model
from support.stack import Stack, stack
from tandem_cli.testing import sweep

pytestmark = pytest.mark.docker

PROFILE = {"COMPOSE_PROFILES": "environment"}
TRY = """
import os, pathlib, socket
def reaches(host, port):
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True
found = {
    "generator": reaches("generator", 8000),
    "internet": reaches("1.1.1.1", 53),
    "secrets": sorted(path.name for path in pathlib.Path("/").glob("*secrets*/*")),
    "weights": any(pathlib.Path("/").glob("weights*/*")) or any(pathlib.Path("/leases").rglob("*.safetensors")),
    "uid": os.getuid(),
}
try:
    pathlib.Path("/leases/run-over").touch()
    found["ends the run"] = True
except OSError:
    found["ends the run"] = False
import json; print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, int]]:
    """A finished run whose environment was a container, and the status of `docker compose up`."""
    sweep()
    project = tmp_path_factory.mktemp("environment") / "project"
    make_tiny_model(project / "model", vocab=75, max_position_embeddings=256)
    where = settings(environment="episodes:Echo", environment_urls=["http://environment:8100"])
    trainer = {"max_steps": 2, "log_completions": 8, "rewards": []} | where
    config = {"shared": {"model": "model"}, "generator": {"engine": "vllm"}, "trainer": trainer}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    (project / "episodes.py").write_text(CODE)
    (project / "prompts.jsonl").write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(8)))
    with stack(project, variables=PROFILE) as made:
        made.must("build", timeout_s=1800)
        made.must("up", "--no-build", "--detach", "environment")
        found = json.loads(made.python("environment", TRY))
        assert found == {
            "generator": False, "internet": False, "secrets": ["token"], "weights": False, "uid": 10001,
            "ends the run": False,
        }  # fmt: skip
        ended = made.compose("up", "--no-build", timeout_s=240)
        yield made, ended.returncode


def test_plain_up_returns_when_the_run_is_over_and_no_service_has_failed(run: tuple[Stack, int]) -> None:
    made, status = run
    assert status == 0, made.logs("trainer")
    for service in ("trainer", "generator", "environment"):
        assert made.container(service).attrs["State"]["ExitCode"] == 0, made.logs(service)
    assert "done" in made.logs("trainer")


def test_the_episodes_were_played_in_the_container(run: tuple[Stack, int]) -> None:
    made, _ = run
    show = "import pathlib; print(pathlib.Path('/runs/default/rollouts.jsonl').read_text())"
    lines = made.must("run", "--rm", "--no-deps", "--entrypoint", "python3", "trainer", "-c", show)
    episodes = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    assert len(episodes) == 16
    assert {one["status"] for one in episodes} <= {"finished", "max_tokens", "max_turns"}
    assert max(one["turns"] for one in episodes) > 1
