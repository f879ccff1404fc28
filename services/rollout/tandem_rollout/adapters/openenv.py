"""Play episodes on an OpenEnv server: what it can do becomes tools, and its rewards score the episode.

Example, in `games.py` of the project:

    from tandem_rollout.adapters.openenv import OpenEnv

    maze = OpenEnv("http://maze:8000")

and in config.yaml:

    trainer:
      rollout: {environment: "games:maze"}

Needs `pip install "tandem-rollout[openenv]"`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from ..environments.base import Done
from ..rendering import Schema
from ..tools import as_text
from . import load_library

_CALLS_TOOLS = frozenset({"Action", "CallToolAction", "ListToolsAction"})
"""Titles of the action schemas of servers that list their tools."""
_NOT_SHOWN = frozenset({"reward", "done", "metadata"})


def shown(observation: Mapping[str, Any]) -> str:
    """Return what an environment observed as JSON, without the reward. Of the call of a listed tool: its result.

    Raises:
        ValueError: the call failed.
    """
    if observation.keys() >= {"tool_name", "result", "error"}:
        if observation["error"]:
            raise ValueError(observation["error"]["message"])
        result = observation["result"]
        return as_text(result["data"] if isinstance(result, Mapping) and "data" in result else result)
    return json.dumps({k: v for k, v in observation.items() if k not in _NOT_SHOWN}, ensure_ascii=False)


class OpenEnv:
    """Makes environments. Each has a connection of its own, which is a session on the server.

    If the server lists tools, the policy gets these. Otherwise it gets one tool, `act`, with the fields of the server's
    actions. `reset` gets all columns of the row. The reward of an episode is the sum of the server's rewards.
    """

    def __init__(
        self,
        base_url: str,
        *,
        text_field: str | None = None,
        show: Callable[[Mapping[str, Any]], str] = shown,
        name: str = "OpenEnv",
    ) -> None:
        """
        Args:
            text_field: the field of an action that gets what the policy says. The policy then has no tools, and the
                episode ends when the server says so. None: the policy acts by calling tools.
            show: what the policy reads of an observation.
            name: the name of the reward.

        Raises:
            UserError: openenv is not installed.
        """
        self._library = load_library("openenv", "openenv.core")
        self._base_url = base_url.rstrip("/")
        self._text_field = text_field
        self._show = show
        self._name = name
        self._class: type[_Session] | None = None

    def __repr__(self) -> str:
        return f"OpenEnv({self._base_url})"

    def __call__(self) -> Any:
        """Connect to the server. See `environments.classes.Factory`."""
        client = self._library.GenericEnvClient(base_url=self._base_url).sync()
        client.connect()
        try:
            self._class = self._class or self._made(client)
            return self._class(client, self._show)
        except BaseException:
            client.close()
            raise

    def _made(self, client: Any) -> type[_Session]:
        """Return the class of the environments: its methods are the tools that the server offers."""
        methods: dict[str, Any]
        if self._text_field is not None:
            methods = {"step": _answering(self._text_field)}
        else:
            response = httpx.get(f"{self._base_url}/schema")
            response.raise_for_status()
            action = response.json()["action"]
            listed = _listed_tools(client) if action.get("title") in _CALLS_TOOLS else {"act": _acting(action)}
            methods = dict(listed)
        return type(self._name, (_Session,), methods)


class _Session:
    """One connection. It is used for many episodes, one after another."""

    def __init__(self, client: Any, show: Callable[[Mapping[str, Any]], str]) -> None:
        self._client = client
        self._show = show
        self._reward = 0.0
        self._done = False
        self._lost: Exception | None = None

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def reset(self, **columns: Any) -> str:
        """Begin an episode. The server takes the columns that it knows."""
        self._reward, self._done, self._lost = 0.0, False, None
        return self._read(self._client.reset(**{name: columns[name] for name in columns if name != "prompt"}))

    def get_reward(self) -> float:
        """Return the sum of the rewards."""
        if self._lost is not None:
            raise self._lost
        return self._reward

    def _act(self, action: Mapping[str, Any]) -> str:
        if self._lost is not None:
            raise self._lost
        if self._done:
            raise ValueError("the episode is over")
        try:
            result = self._client.step(dict(action))
        except RuntimeError:  # the server's answer: the policy reads it
            raise
        except Exception as error:  # the client would connect again, to another session
            self._lost = error
            raise
        return self._read(result)

    def _read(self, result: Any) -> str:
        self._reward += float(result.reward or 0.0)
        self._done = bool(result.done)
        return self._show(result.observation)


def _answering(field: str) -> Callable[..., Any]:
    async def step(self: _Session, message: Mapping[str, Any]) -> str | Done:
        text = await asyncio.to_thread(self._act, {field: message["content"]})
        return Done() if self._done else text

    return step


def _acting(action: Mapping[str, Any]) -> Callable[..., Any]:
    """The tool of a server with one kind of action."""

    def act(self: _Session, **fields: Any) -> str:
        return self._act(fields)

    properties = {name: field for name, field in action.get("properties", {}).items() if name != "metadata"}
    parameters = {**action, "type": "object", "properties": properties}
    return _tool("act", act, action.get("description") or "Act in the environment.", parameters)


def _listed_tools(client: Any) -> dict[str, Callable[..., Any]]:
    """The tools of a server that lists them."""

    def calling(name: str) -> Callable[..., Any]:
        def call(self: _Session, **arguments: Any) -> str:
            return self._act({"type": "call_tool", "tool_name": name, "arguments": arguments})

        return call

    tools = client.step({"type": "list_tools"}).observation["tools"]
    return {
        one["name"]: _tool(one["name"], calling(one["name"]), one["description"], one["input_schema"]) for one in tools
    }


def _tool(
    name: str, function: Callable[..., Any], description: str, parameters: Mapping[str, Any]
) -> Callable[..., Any]:
    schema: Schema = {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": dict(parameters)},
    }
    function.__name__ = name
    function.tool_schema = schema  # type: ignore[attr-defined]  # see `Tool.of`
    return function
