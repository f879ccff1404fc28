"""Adapters with the real libraries. Each is played in a process of its own, with the packages of its library."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from support.agent_libraries import OPENENV, VERIFIERS
from support.ports import free_port

pytestmark = pytest.mark.agents
TESTS = Path(__file__).parent.parent
TIMEOUT_S = 180.0


def program(library: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a program of tests/support with a library."""
    folders = [library, TESTS, TESTS / "support", os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, TESTS / "support" / name, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_ends_well(playing: subprocess.Popen[str]) -> None:
    try:
        _, errors = playing.communicate(timeout=TIMEOUT_S)
    finally:
        playing.kill()
    assert playing.returncode == 0, errors


@contextmanager
def openenv_server() -> Iterator[str]:
    """A server of the real OpenEnv."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with program(OPENENV, "openenv_server.py", str(port)) as server:
        try:
            _wait_for(f"{url}/schema", server)
            yield url
        finally:
            server.kill()


def _wait_for(url: str, server: subprocess.Popen[str]) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            httpx.get(url).raise_for_status()
            return
        except httpx.TransportError:
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < give_up_s, f"{url} does not answer"
            time.sleep(0.2)


def test_episodes_on_a_server_of_openenv() -> None:
    with openenv_server() as url:
        assert_ends_well(program(OPENENV, "play_openenv.py", url))


def test_a_task_of_verifiers() -> None:
    assert_ends_well(program(VERIFIERS, "play_verifiers.py"))
