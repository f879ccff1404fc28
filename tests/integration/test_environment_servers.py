"""Real environment servers: one that is killed fails its episodes, which go on with another."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.environment_classes import play, player
from support.environment_servers import TOKEN
from support.episodes import Policy, Row
from tandem_rollout.environments import RemoteEnvironments
from tandem_rollout.environments.servers import Servers

CODE = """
class Talk:
    def reset(self, secret):
        self.secret = secret

    async def step(self, message):
        from tandem_rollout.environments import Done
        return Done(1.0) if message["content"] == self.secret else "no"
"""
CONFIG = {"shared": {"model": "model"}, "trainer": {"max_steps": 1, "rollout": {"environment": "talk:Talk"}}}
ROW = Row("Guess.", (), {"secret": "5"})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "talk.py").write_text(CODE)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@contextmanager
def serving(project: Path, *arguments: str, token: str | None = TOKEN) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tandem_rollout.server", "--config", str(project / "config.yaml"), *arguments]
    command += ["--trainer.rollout.environment_server.port", str(port)]
    env = {**os.environ, "TANDEM_TOKEN": "not-for-environments"} | (
        {"TANDEM_ENVIRONMENT_TOKEN": token} if token else {}
    )
    with (project / f"{port}.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd="/")
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_ready(*urls: str) -> None:
    deadline = time.monotonic() + 60
    for url in urls:
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/healthz").status_code == 200:
                    break
            time.sleep(0.1)


def remote(*urls: str) -> RemoteEnvironments:
    servers = Servers(urls, TOKEN, owner="test/0", timeout_s=20.0, open_timeout_s=20.0)
    return RemoteEnvironments(servers, start_timeout_s=60.0)


class Killer(Policy):
    """Kills servers before its second turn."""

    def __init__(self, *processes: subprocess.Popen[bytes]) -> None:
        super().__init__("1", "5")
        self._processes = processes

    async def __call__(self, *args: Any, turn: int, **kwargs: Any) -> Any:
        if turn == 1:
            for process in self._processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
            self._processes = ()
        return await super().__call__(*args, turn=turn, **kwargs)


async def test_a_killed_server_fails_the_episode_with_its_reason_and_another_is_used(project: Path) -> None:
    with serving(project) as (first, one), serving(project) as (_, other):
        environments = remote(one, other)
        await environments.start()
        failed = await player(environments).play_group(environments, ROW, 0, [Killer(first)], attempts=1)
        assert [t.status for t in failed.trajectories] == ["failed"]
        assert f"{one} cannot be reached: ConnectError" in str(failed.trajectories[0].reason)
        again = await play(environments, "1", "5", row=ROW, size=4)
        assert [(t.status, t.reward) for t in again.trajectories] == [("finished", 1.0)] * 4
        await environments.close()


def test_sigterm_ends_the_server_with_status_0(project: Path) -> None:
    with serving(project) as (process, url):
        wait_ready(url)
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "token", "said"),
    [
        (["--trainer.rollout.environment", "talk:Walk"], TOKEN, "has no class 'Walk', expected one of: Talk"),
        (["--trainer.rollout.environment_server.host", "0.0.0.0"], None, "no token is set. Fix: set TANDEM_ENVIRON"),
    ],
)
def test_a_mistake_ends_the_server_with_status_2(
    project: Path, arguments: list[str], token: str | None, said: str
) -> None:
    with serving(project, *arguments, token=token) as (process, _):
        assert process.wait(60) == 2
    (log,) = project.glob("*.log")
    assert said in log.read_text()


def test_the_server_needs_neither_torch_nor_what_only_prompts_need(project: Path) -> None:
    missing = ("torch", "datasets", "pandas", "pyarrow", "vllm", "accelerate", "prometheus_client")
    program = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\nimport tandem_rollout.server"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
