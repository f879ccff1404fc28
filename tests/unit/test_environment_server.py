"""An environment server: who may use it, what requests may follow each other, and how sessions end."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from support.environment_classes import CounterEnv, started
from support.environment_servers import TOKEN, Replica
from support.play import Made, Scripted, add, loops
from tandem_protocol.errors import ErrorBody
from tandem_rollout.environments import EnvironmentFailed, Start, Step
from tandem_rollout.turns import Turn

ROW = {"owner": "rank-0", "prompt": "Hi."}
TURN = {"message": {"role": "assistant", "content": "x"}}


class Waits(Scripted):
    """Its steps wait until the test lets them go on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.steps = 0
        self.cancelled = False

    async def step(self, turn: Turn) -> Step:
        self.steps += 1
        self.entered.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return Step([{"role": "user", "content": "Go on."}])


def raise_by(amount: Any) -> dict[str, Any]:
    function = {"name": "raise_by", "arguments": {"amount": amount}}
    return {"message": {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": function}]}}


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, ErrorBody.model_validate_json(response.content).code


async def opened(replica: Replica, name: str = "a") -> None:
    (await replica.client.put(f"/v1/sessions/{name}", json=ROW)).raise_for_status()


async def test_every_route_but_the_health_needs_the_token() -> None:
    replica = Replica(loops(add))
    routes = [route for route in replica.app.routes if isinstance(route, APIRoute)]
    assert len(routes) == 7
    for route in routes:
        path = route.path.replace("{session}", "a").replace("{number}", "0")
        for sent in ("", "Bearer wrong", f"Basic {TOKEN}", TOKEN):
            (method,) = route.methods
            response = await replica.client.request(method, path, headers={"Authorization": sent})
            if path == "/healthz":
                assert response.json() == {"status": "alive"}
            else:
                assert error(response) == (401, "unauthorized"), (method, path, sent)
    assert len(replica.sessions) == 0


async def test_a_repeated_request_gets_the_first_answer_and_is_carried_out_once() -> None:
    replica = Replica(await started(CounterEnv))
    for _ in range(2):
        await opened(replica)
    taken = [(await replica.client.put("/v1/sessions/a/steps/0", json=raise_by(2))).json() for _ in range(2)]
    assert taken[0] == taken[1]
    assert taken[0]["messages"] == [{"role": "tool", "tool_call_id": "a", "name": "raise_by", "content": "2"}]
    taken = [(await replica.client.put("/v1/sessions/a/steps/1", json=raise_by(2))).json() for _ in range(2)]
    assert taken[1]["messages"][0]["content"] == "4"
    rewards = [(await replica.client.get("/v1/sessions/a/rewards")).json() for _ in range(2)]
    assert rewards[0] == rewards[1] == {"rewards": {"CounterEnv": 0.0}}


async def test_a_request_that_is_repeated_while_it_runs_waits_for_the_same_answer() -> None:
    replica = Replica(made := Made(Waits))
    await opened(replica)
    first = asyncio.create_task(replica.client.put("/v1/sessions/a/steps/0", json=TURN))
    await made.environments[0].entered.wait()
    second = asyncio.create_task(replica.client.put("/v1/sessions/a/steps/0", json=TURN))
    assert error(await replica.client.get("/v1/sessions/a/rewards")) == (409, "out_of_turn")
    made.environments[0].go_on.set()
    assert (await first).json() == (await second).json()
    assert made.environments[0].steps == 1


async def test_a_step_out_of_turn_or_of_an_unknown_session_is_refused() -> None:
    replica = Replica(await started(CounterEnv))
    await opened(replica)
    assert error(await replica.client.put("/v1/sessions/a/steps/1", json=TURN)) == (409, "out_of_turn")
    for request in ("PUT /v1/sessions/b/steps/0", "GET /v1/sessions/b/rewards"):
        method, path = request.split()
        assert error(await replica.client.request(method, path, json=TURN)) == (404, "unknown_session")
    assert (await replica.client.delete("/v1/sessions/b")).status_code == 204
    assert len(replica.sessions) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/sessions/b", {"owner": "x", "colums": {}}),
        ("/v1/sessions/b", ["x"]),
        ("/v1/sessions/a/steps/zero", TURN),
        ("/v1/sessions/a/steps/0", {"message": {"role": "assistant"}}),
        ("/v1/sessions/a/steps/0", {"message": {"role": "assistant", "content": "", "tool_calls": [{"name": "x"}]}}),
        ("/v1/sessions/a/steps/0", {"message": {"role": "assistant", "content": "", "tool_calls": 7}}),
    ],
)
async def test_a_wrong_body_is_refused_and_the_session_goes_on(path: str, body: Any) -> None:
    replica = Replica(await started(CounterEnv))
    await opened(replica)
    assert error(await replica.client.put(path, json=body)) == (422, "bad_request")
    assert (await replica.client.put("/v1/sessions/a/steps/0", json=raise_by(1))).status_code == 200


async def test_an_idle_session_is_discarded_but_not_one_that_works() -> None:
    now_s = 0.0
    replica = Replica(made := Made(Waits), clock=lambda: now_s, idle_timeout_s=60)
    for name in ("idle", "busy"):
        await opened(replica, name)
    idle, busy = made.environments
    step = asyncio.create_task(replica.client.put("/v1/sessions/busy/steps/0", json=TURN))
    await busy.entered.wait()
    now_s = 59.0
    await replica.sessions.discard_idle()
    assert len(replica.sessions) == 2
    now_s = 61.0
    await replica.sessions.discard_idle()
    assert (idle.closed, busy.closed) == ([True], [])
    assert error(await replica.client.put("/v1/sessions/idle/steps/0", json=TURN)) == (404, "unknown_session")
    busy.go_on.set()
    assert (await step).status_code == 200
    await replica.sessions.discard_idle()
    assert len(replica.sessions) == 1, "it has just been used"


async def test_an_idle_session_that_cannot_be_closed_does_not_keep_the_places_of_others() -> None:
    class Hangs(Scripted):
        async def close(self, *, failed: bool) -> None:
            await asyncio.sleep(60)

    now_s = 0.0
    replica = Replica(Made(Hangs), clock=lambda: now_s, idle_timeout_s=60, max_sessions=2)
    for name in ("a", "b"):
        await opened(replica, name)
    now_s = 61.0
    discarding = asyncio.create_task(replica.sessions.discard_idle())
    await asyncio.sleep(0.01)
    assert len(replica.sessions) == 0
    discarding.cancel()


async def test_a_session_that_is_closed_while_it_works_is_cancelled_and_not_used_again() -> None:
    replica = Replica(made := Made(Waits))
    await opened(replica)
    step = asyncio.create_task(replica.client.put("/v1/sessions/a/steps/0", json=TURN))
    await made.environments[0].entered.wait()
    assert (await replica.client.delete("/v1/sessions/a")).status_code == 204
    assert error(await step) == (404, "unknown_session")
    assert (made.environments[0].cancelled, made.environments[0].closed) == (True, [True])


class Fails(Scripted):
    async def reset(self, row: Any) -> Start:
        raise EnvironmentFailed("environment Shop: reset: no database")


async def test_an_environment_that_fails_says_why_and_is_closed() -> None:
    replica = Replica(made := Made(Fails))
    response = await replica.client.put("/v1/sessions/a", json=ROW)
    assert response.json() == {
        "code": "environment_failed",
        "message": "environment Shop: reset: no database",
        "retryable": False,
    }
    assert made.environments[0].closed == [True]
    assert len(replica.sessions) == 0


async def test_a_request_has_a_deadline_also_if_the_environment_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_rollout.environments.wire.MARGIN_S", 0.05)
    replica = Replica(made := Made(Waits), timeout_s=0.05)
    await opened(replica)
    response = await replica.client.put("/v1/sessions/a/steps/0", json=TURN)
    assert error(response) == (500, "environment_failed")
    assert "no answer within 0.1 s" in response.text
    assert made.environments[0].closed == [True]


async def test_an_instance_is_used_again_unless_its_episode_has_failed() -> None:
    replica = Replica(await started(CounterEnv), max_sessions=1)
    used = []
    for name, failed in (("a", False), ("b", True), ("c", False)):
        await opened(replica, name)
        used.append(replica.sessions._sessions[name].environment.instance)
        assert error(await replica.client.put("/v1/sessions/more", json=ROW)) == (503, "sessions_full")
        await replica.client.delete(f"/v1/sessions/{name}", params={"failed": failed})
    assert used[0] is used[1]
    assert used[1] is not used[2]


async def test_a_request_to_open_that_arrives_late_does_not_begin_the_episode_again() -> None:
    replica = Replica(await started(CounterEnv))
    await opened(replica)
    await replica.client.put("/v1/sessions/a/steps/0", json=raise_by(2))
    assert error(await replica.client.put("/v1/sessions/a", json={"owner": "rank-0"})) == (409, "out_of_turn")
    taken = (await replica.client.put("/v1/sessions/a/steps/1", json=raise_by(2))).json()
    assert taken["messages"][0]["content"] == "4"
