"""Train on a taskset of verifiers: its harness calls the policy, and its rewards score the episode.

Example, in `agents.py` of the project:

    from tandem_rollout.adapters.verifiers import VerifiersAgent

    run = VerifiersAgent("my-taskset")

and in config.yaml:

    trainer:
      prompts: {source: tasks.jsonl}
      rollout: {agent: "agents:run"}

The column `task` of the data set is the number of a task. `python -m tandem_rollout.adapters.verifiers my-taskset`
prints such a data set. Needs `pip install "tandem-rollout[verifiers]"`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..agents import AgentClient
from . import load_library

_MODULE = "tandem_rollout.adapters.verifiers"


class VerifiersAgent:
    """An agent that plays one task of a taskset. See `agents.Run`."""

    def __init__(self, env: str | Mapping[str, Any]) -> None:
        """
        Args:
            env: the id of a taskset, which the harness `null` plays in a process of this machine. Or verifiers' own
                settings of an environment, such as `{"taskset": {"id": "my-taskset"}, "agent": {"max_turns": 5}}`.

        Raises:
            UserError: verifiers is not installed.
        """
        self._clients = load_library("verifiers", "verifiers.v1.clients")
        self._loaders = load_library("verifiers", "verifiers.v1.utils.loaders")
        self._settings = _played_by_null(env) if isinstance(env, str) else dict(env)
        self._reading = threading.Lock()
        self._tasks: list[Any] = []
        self._unread: Iterator[Any] | None = None

    async def __call__(self, row: Mapping[str, Any], client: AgentClient) -> float:
        """Play the task of a row. Return the sum of the rewards of all traces that verifiers would train on.

        Raises:
            RuntimeError: the episode failed; says why.
        """
        task = await asyncio.to_thread(self.task, row["task"])
        environment = self._environment()  # serves one episode: the clients of a shared one would pile up
        with _key_in_environment(client.api_key) as variable:
            endpoint = self._clients.EvalClientConfig(base_url=client.base_url, api_key_var=variable)
            model = self._clients.ModelContext(model=client.model, client=endpoint)
            async with environment.serving():
                episode = await environment.run_episode(task, model)
        if not episode.ok:
            errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
            raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors) or "it is not ok")
        return float(sum(trace.reward for trace in episode.traces if trace.agent.trainable))

    def task(self, number: int) -> Any:
        """Return a task. The taskset is read up to it, because it may have no end.

        Raises:
            ValueError: the taskset has no task with this number.
        """
        with self._reading:
            if self._unread is None:
                self._unread = iter(self._environment().taskset)
            while len(self._tasks) <= number:
                try:
                    self._tasks.append(next(self._unread))
                except StopIteration:
                    raise ValueError(
                        f"got the task {number}, but the taskset has only {len(self._tasks)}. Fix: make the data set "
                        f"again: python -m {_MODULE} TASKSET"
                    ) from None
            return self._tasks[number]

    def _environment(self) -> Any:
        return self._loaders.load_environment(self._loaders.resolve_env_config(self._settings))


def _played_by_null(taskset: str) -> dict[str, Any]:
    """Settings for a harness without tools of its own. verifiers' default is a shell in a rented sandbox."""
    return {"taskset": {"id": taskset}, "agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}}


@contextmanager
def _key_in_environment(key: str) -> Iterator[str]:
    """Yield the name of a variable with the key. verifiers reads keys from variables, and hides these from harnesses
    because of `API_KEY` in their names."""
    variable = f"TANDEM_API_KEY_{secrets.token_hex(8)}"
    os.environ[variable] = key
    try:
        yield variable
    finally:
        del os.environ[variable]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=main.__doc__)
    parser.add_argument("taskset", help="the id of the taskset")
    parser.add_argument("--limit", type=int, help="number of tasks; all by default")
    return parser.parse_args(arguments)


def main() -> None:
    """Print a data set with a row for each task."""
    options = parse()
    agent = VerifiersAgent(options.taskset)
    number = 0
    while options.limit is None or number < options.limit:
        try:
            task = agent.task(number)
        except ValueError:
            break
        print(json.dumps({"prompt": task.data.prompt_text, "task": number}, ensure_ascii=False))
        number += 1


if __name__ == "__main__":
    main()
