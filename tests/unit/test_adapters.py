"""Adapters of other libraries, tried with stand-ins that have the same interface.

test_adapters_with_libraries.py does the same with the real ones, where they are installed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest

from support.agents import agents, ask, user
from support.environment_classes import play, play_one, said, started
from support.episodes import Policy, Row, called
from tandem_rollout.adapters import load_library
from tandem_rollout.adapters.openenv import OpenEnv
from tandem_rollout.adapters.verifiers import VerifiersAgent, main
from tandem_rollout.agents import AgentClient
from tandem_rollout.errors import UserError
from tandem_rollout.proxy import Proxy

ACTION = {
    "title": "GuessAction",
    "description": "Guess the number.",
    "type": "object",
    "properties": {"number": {"type": "integer"}, "metadata": {"type": "object"}},
    "required": ["number"],
}


class Connection:
    """A session on an OpenEnv server: a guessing game, or a server that lists its tools."""

    opened: list[Connection] = []

    def __init__(self, base_url: str) -> None:
        assert base_url == "http://games:8000"
        self.open = False
        self.reset_with: dict[str, Any] = {}
        Connection.opened.append(self)

    def sync(self) -> Connection:
        return self

    def connect(self) -> None:
        self.open = True

    def close(self) -> None:
        self.open = False

    def reset(self, **columns: Any) -> Any:
        assert self.open
        self.reset_with = columns
        return SimpleNamespace(observation={"text": "Guess.", "metadata": {}}, reward=None, done=False)

    def step(self, action: dict[str, Any]) -> Any:
        if action.get("type") == "list_tools":
            tool = {"name": "double", "description": "Double it.", "input_schema": {"type": "object", "properties": {}}}
            return SimpleNamespace(observation={"tools": [tool]}, reward=None, done=False)
        if action.get("type") == "call_tool":
            number = action["arguments"].get("number")
            error = None if number else {"message": "number is missing"}
            observation = {"tool_name": "double", "result": number and {"data": 2 * number}, "error": error}
            return SimpleNamespace(observation=observation, reward=0.25, done=False)
        number = int(action.get("number", action.get("said", 0)))
        if number == 99:
            raise ConnectionError("closed")
        if number < 0:
            raise RuntimeError("Server error: too small")
        right = number == self.reset_with["secret"]
        observation = {"text": "right" if right else "no", "reward": 0.0}
        return SimpleNamespace(observation=observation, reward=1.0 if right else -0.5, done=right)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The action schema of a stand-in for an OpenEnv server."""
    core = ModuleType("openenv.core")
    core.GenericEnvClient = Connection  # type: ignore[attr-defined]  # a stand-in module
    monkeypatch.setitem(sys.modules, "openenv", ModuleType("openenv"))
    monkeypatch.setitem(sys.modules, "openenv.core", core)
    action = dict(ACTION)

    def get(url: str) -> httpx.Response:
        assert url == "http://games:8000/schema"
        return httpx.Response(200, json={"action": action}, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    Connection.opened = []
    return action


ROW = Row("Play. ", columns={"secret": 7})


async def test_the_policy_acts_on_an_openenv_server_with_a_tool(server: Any) -> None:
    texts = (called("act", number=3), called("act", number=-1), called("act", number=7), called("act", number=7), "Ok.")
    one = await play_one(OpenEnv("http://games:8000/"), *texts, row=ROW)
    assert said(one) == [
        ("user", 'Play. {"text": "Guess."}'),
        ("tool", '{"text": "no"}'),
        ("tool", '{"error": "RuntimeError: Server error: too small"}'),
        ("tool", '{"text": "right"}'),
        ("tool", '{"error": "ValueError: the episode is over"}'),
    ]
    assert (one.status, one.rewards, one.tool_calls, one.tool_errors) == ("finished", {"OpenEnv": 0.5}, 4, 2)


async def test_the_tool_of_an_openenv_server_has_the_fields_of_its_actions(server: Any) -> None:
    environments = await started(OpenEnv("http://games:8000"))
    ((name, function),) = [(s["function"]["name"], s["function"]) for s in environments.schemas]
    assert (name, function["description"]) == ("act", "Guess the number.")
    assert function["parameters"]["properties"] == {"number": {"type": "integer"}}
    assert function["parameters"]["required"] == ["number"]
    await environments.close()


async def test_each_episode_on_an_openenv_server_has_a_connection_which_is_closed_at_the_end(server: Any) -> None:
    environments = await started(OpenEnv("http://games:8000", name="Guess", show=lambda seen: str(seen["text"])))
    for _ in range(2):
        group = await play(environments, called("act", number=7), "Ok.", row=ROW, size=3)
        assert [t.rewards for t in group.trajectories] == [{"Guess": 1.0}] * 3
    assert [m["content"] for m in group.trajectories[0].messages if m["role"] == "tool"] == ["right"]
    assert [(one.open, one.reset_with) for one in Connection.opened] == [(True, {"secret": 7})] * 3
    await environments.close()
    assert not any(one.open for one in Connection.opened)


async def test_a_lost_connection_to_an_openenv_server_fails_the_episode(server: Any) -> None:
    one = await play_one(
        OpenEnv("http://games:8000"), called("act", number=99), called("act", number=7), "Ok.", row=ROW
    )
    assert (one.status, one.reason) == ("failed", "environment OpenEnv: get_reward: ConnectionError: closed")


async def test_what_the_policy_says_can_be_a_field_of_an_openenv_action(server: Any) -> None:
    one = await play_one(OpenEnv("http://games:8000", text_field="said"), "3", "7", "8", row=ROW)
    assert said(one)[1:] == [("user", '{"text": "no"}')]
    assert (one.status, one.turns, one.rewards) == ("finished", 2, {"OpenEnv": 0.5})


async def test_an_openenv_server_may_list_its_tools(server: dict[str, Any]) -> None:
    server["title"] = "CallToolAction"
    one = await play_one(OpenEnv("http://games:8000"), called("double", number=4), called("double"), "8", row=ROW)
    assert said(one)[1:] == [("tool", "8"), ("tool", '{"error": "ValueError: number is missing"}')]
    assert one.rewards == {"OpenEnv": 0.5}


def test_an_adapter_says_which_library_is_missing() -> None:
    with pytest.raises(UserError, match=r"needs nothing_here, .*pip install \"tandem-rollout\[nothing_here\]\""):
        load_library("nothing_here", "nothing_here.core")
    with pytest.raises(ModuleNotFoundError):
        load_library("one", "another_that_one_needs")


class Environment:
    """A verifiers environment whose harness asks the policy once."""

    def __init__(self, settings: Any) -> None:
        self.taskset = [task(f"What is {n}+1?", str(n + 1)) for n in range(3)]
        self.settings = settings
        self.is_serving = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        self.is_serving = True
        yield
        self.is_serving = False

    async def run_episode(self, one: Any, model: Any) -> Any:
        assert self.is_serving
        endpoint = model.client
        assert "API_KEY" in endpoint.api_key_var  # verifiers hides such variables from harnesses
        client = AgentClient(endpoint.base_url, os.environ[endpoint.api_key_var], model.model)
        answer = await ask(client, [user(one.data.prompt_text)])
        if "broken" in answer.choices[0].message.content:
            errors = [SimpleNamespace(type="HarnessError", message="no answer")]
            return SimpleNamespace(ok=False, errors=[], traces=[trace(0.0, errors=errors)])
        reward = float(one.data.answer in answer.choices[0].message.content)
        return SimpleNamespace(ok=True, errors=[], traces=[trace(reward), trace(10.0, trainable=False)])


def task(prompt: str, answer: str) -> Any:
    return SimpleNamespace(data=SimpleNamespace(prompt_text=prompt, answer=answer))


def trace(reward: float, *, trainable: bool = True, errors: Any = ()) -> Any:
    return SimpleNamespace(reward=reward, agent=SimpleNamespace(trainable=trainable), errors=list(errors))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The settings of the environments that a stand-in for verifiers has made."""
    pytest.importorskip("openai")
    given: list[Any] = []
    clients, loaders = ModuleType("verifiers.v1.clients"), ModuleType("verifiers.v1.utils.loaders")
    vars(clients).update(EvalClientConfig=SimpleNamespace, ModelContext=SimpleNamespace)
    vars(loaders).update(resolve_env_config=lambda one: given.append(one) or one, load_environment=Environment)
    for name in ("verifiers", "verifiers.v1", "verifiers.v1.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "verifiers.v1.clients", clients)
    monkeypatch.setitem(sys.modules, "verifiers.v1.utils.loaders", loaders)
    yield given
    assert not [name for name in os.environ if name.startswith("TANDEM_API_KEY")]


@pytest.mark.parametrize(
    ("number", "says", "reward", "reason"),
    [
        (1, "It is 2.", 1.0, None),
        (2, "It is 2.", 0.0, None),
        (1, "broken", None, "agent agent: RuntimeError: HarnessError: no answer"),
        (5, "2", None, "agent agent: ValueError: got the task 5, but the taskset has only 3"),
    ],
)
async def test_a_task_of_verifiers_is_played_and_scored(
    settings: list[Any], number: int, says: str, reward: float | None, reason: str | None
) -> None:
    proxy = Proxy("policy")
    async with proxy.serve():
        one = await agents(VerifiersAgent("sums"), proxy).play(Row("Q", columns={"task": number}), Policy(says))
    assert one.reward == reward
    assert str(one.reason).startswith(str(reason))
    assert settings[0] == {
        "taskset": {"id": "sums"},
        "agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}},
    }


def test_settings_of_verifiers_are_passed_on(settings: list[Any]) -> None:
    agent = VerifiersAgent({"taskset": {"id": "sums"}, "agent": {"max_turns": 5}})
    assert agent.task(2).data.answer == "3"
    assert settings == [{"taskset": {"id": "sums"}, "agent": {"max_turns": 5}}]


def test_the_tasks_of_verifiers_become_a_data_set(
    settings: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, size in (([], 3), (["--limit", "2"], 2)):
        monkeypatch.setattr("sys.argv", ["verifiers", "sums", *options])
        main()
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert rows == [{"prompt": f"What is {n}+1?", "task": n} for n in range(size)]
