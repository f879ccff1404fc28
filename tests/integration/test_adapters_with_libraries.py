"""Adapters with the real libraries. Each test needs one of them, such as `pip install "tandem-rollout[openenv]"`."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support import agents
from support.environment_classes import play, said, started
from support.episodes import Policy, Row, called
from tandem_rollout.adapters.openenv import OpenEnv
from tandem_rollout.adapters.verifiers import VerifiersAgent
from tandem_rollout.proxy import Proxy

SUPPORT = Path(__file__).parent.parent / "support"
START_S = 120.0


@pytest.fixture
def openenv_url() -> Iterator[str]:
    """A server of the real OpenEnv."""
    pytest.importorskip("openenv", reason='openenv is not installed: pip install "tandem-rollout[openenv]"')
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, str(SUPPORT / "openenv_server.py"), str(port)]) as server:
        try:
            _wait_for(f"{url}/schema", server)
            yield url
        finally:
            server.kill()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    give_up_s = time.monotonic() + START_S
    while True:
        try:
            httpx.get(url).raise_for_status()
            return
        except httpx.TransportError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < give_up_s, f"{url} does not answer"
            time.sleep(0.2)


async def test_episodes_on_a_server_of_openenv(openenv_url: str) -> None:
    environments = await started(OpenEnv(openenv_url), timeout_s=60)
    ((tool, parameters),) = [(s["function"]["name"], s["function"]["parameters"]) for s in environments.schemas]
    assert (tool, list(parameters["properties"]), parameters["required"]) == ("act", ["number"], ["number"])
    texts = (
        called("act", number=3),
        called("act", number="x"),
        called("act", number=-1),
        called("act", number=7),
        "Ok.",
    )
    group = await play(environments, *texts, row=Row("Play. ", columns={"secret": 7}), size=4)
    assert [(t.status, t.rewards) for t in group.trajectories] == [("finished", {"OpenEnv": 0.5})] * 4
    answers = [content for role, content in said(group.trajectories[0]) if role == "tool"]
    assert [answers[0], answers[3]] == ['{"text": "no"}', '{"text": "right"}']
    assert ["VALIDATION_ERROR" in answers[1], "too small" in answers[2]] == [True, True]
    await environments.close()


async def test_a_task_of_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("verifiers", reason='verifiers is not installed: pip install "tandem-rollout[verifiers]"')
    monkeypatch.syspath_prepend(str(SUPPORT))
    run = VerifiersAgent("verifiers-sums")
    proxy = Proxy("policy")
    async with proxy.serve():
        for says, reward in (("It is 2.", 2.0), ("No idea.", 0.0)):
            policy = Policy(says)
            one = await agents.agents(run, proxy, timeout_s=300).play(Row("Q", columns={"task": 1}), policy)
            assert (one.reason, one.status, one.reward, one.turns) == (None, "finished", reward, 1)
            assert one.messages[0] == {"role": "user", "content": "What is 1+1?"}
            agents.assert_trains_what_the_policy_said(one, policy)
