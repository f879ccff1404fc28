"""With TANDEM_LOG=json, every line that a process writes is a record, whatever the project and libraries print.

test_quiet_with_mock.py and test_trl_with_mock.py hold the same for two ranks and for TRL scripts, in their own runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from support.environment_servers import TOKEN as ENVIRONMENT_TOKEN
from support.generators import TOKEN, running
from support.json_logs import messages, records
from support.ports import free_port
from support.projects import Project

DEADLINE_S = 120.0
NOISE = """
import logging, sys, warnings
from tqdm import tqdm


def make_noise(name):
    print(f"{name}: printed", "on\\ntwo lines")
    print(f"{name}: without an end", end="", file=sys.stderr)
    print(file=sys.stderr)
    sys.stderr.write(f"{name}: written\\n")
    warnings.warn(f"{name}: warned on\\ntwo lines")
    logging.getLogger("of_the_project").warning("%s: logged on\\ntwo lines", name)
    logging.error("%s: root", name)
    for _ in tqdm(range(3), desc=f"{name}: progress"):
        pass
"""
REWARDS = """
from noise import make_noise
make_noise("import")

def odd(completion_ids, **_):
    make_noise("reward")
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

def sandboxed(completion_ids, **_):
    make_noise("sandbox")
    return [0.0] * len(completion_ids)
"""
ENVIRONMENT = """
from noise import make_noise

class Talk:
    def reset(self):
        make_noise("reset")
        raise KeyError("an environment that\\nfails")

    async def step(self, message):
        from tandem_rollout.environments import Done
        return Done(1.0)
"""
SAID = ("printed on", "two lines", "without an end", "written", "warned on two lines", "logged on", "root", "progress")


@pytest.fixture(autouse=True)
def _json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_LOG", "json")


def test_launcher_trainer_sandbox_and_generator_log_only_records(make_project: Callable[..., Project]) -> None:
    rewards = [{"function": "odd_rewards:odd"}, {"function": "odd_rewards:sandboxed", "sandbox": True}]
    project = make_project(faults=("--generator.visible_timeout_s", "0.1"), rewards=rewards, max_steps=2)
    project.forks = False
    (project.directory / "odd_rewards.py").write_text(REWARDS)
    (project.directory / "noise.py").write_text(NOISE)
    project.generator.put("1.1", "0" * 16)  # type: ignore[arg-type]  # a version that is not in the store
    done = project.train()
    found = records(done.stdout, done.stderr)
    assert done.returncode == 0, messages(found)
    said = messages(found)
    for place in ("import", "reward", "sandbox"):
        assert all(f"{place}: {what}" in said for what in SAID if what != "two lines"), place
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(steps) == 2
    assert all(name in steps[0] for name in ("1/2", "reward ", "tokens/s", "lag ", " s"))
    served = messages(records(project.generator.log.read_text()))
    assert "serving version 2.1, switched in" in served
    assert "version 1.1 is not served" in served


def test_a_generator_says_that_a_client_has_left(model: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    slow = ("--generator.mock.faults.token_latency_s", "5")
    with running("mock", model, tmp_path / "weights", *slow, log=tmp_path / "log") as generator:
        request = {"prompts": [{"token_ids": [1, 2]}] * 3, "sampling": {"n": 2, "max_tokens": 30}}
        for _ in range(5):
            with pytest.raises(httpx.ReadTimeout):
                generator.client.post("/rollouts", json=request, timeout=0.5)
        wait_for(lambda: "lost 3 of 3 groups" in generator.log.read_text())
    found = records((tmp_path / "log").read_text())
    left = [record for record in found if "its client has left" in record["message"]]
    assert [(record["lost"], record["groups"]) for record in left] == [(3, 3)]  # the others are counted


def test_an_environment_server_logs_only_records(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(ENVIRONMENT)
    (tmp_path / "noise.py").write_text(NOISE)
    trainer = {"max_steps": 1, "rollout": {"environment": "talk:Talk"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"shared": {"model": "model"}, "trainer": trainer}))
    port = free_port()
    words = ["-m", "tandem_rollout.server", "--config", "config.yaml"]
    words += ["--trainer.rollout.environment_server.port", str(port)]
    env = {**os.environ, "TANDEM_ENVIRONMENT_TOKEN": ENVIRONMENT_TOKEN}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, *words], env=env, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/healthz"))
        headers = {"Authorization": f"Bearer {ENVIRONMENT_TOKEN}"}
        answer = httpx.put(f"http://127.0.0.1:{port}/v1/sessions/a", json={"prompt": "x"}, headers=headers, timeout=60)
        assert "an environment that" in answer.text
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    said = messages(records((tmp_path / "log").read_text()))
    assert all(f"reset: {what}" in said for what in SAID if what != "two lines")


def test_the_page_of_runs_logs_only_records(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    output = tmp_path / "log"
    with output.open("w") as log:
        words = [sys.executable, "-m", "tandem_cli", "watch", "--port", "0", str(tmp_path / "runs/mine")]
        page = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "Ctrl-C ends the page" in output.read_text())
    finally:
        page.terminate()
        page.wait(60)
    said = messages(records(output.read_text()))
    assert "Open http://127.0.0.1:" in said
    assert "mine has not started yet" in said


@pytest.mark.parametrize(
    "words",
    [
        ["tandem_generator", "--engine", "mock"],
        ["tandem_trainer.launch", "--config", "config.yaml"],
        ["tandem_rollout.server", "--config", "config.yaml"],
        ["tandem_cli", "watch", "."],
    ],
    ids=lambda words: words[0],
)
def test_another_format_is_refused_with_the_expected_ones(words: list[str], tmp_path: Path) -> None:
    env = {**os.environ, "TANDEM_LOG": "JSON", "TANDEM_TOKEN": TOKEN}
    (tmp_path / "metrics.jsonl").touch()
    done = subprocess.run(
        [sys.executable, "-m", *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 2
    assert "got TANDEM_LOG=JSON, expected text or json" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code < 500
    except httpx.TransportError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
