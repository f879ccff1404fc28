"""Run a reward function in its own process, for rewards that execute untrusted code.

The process is killed at its deadline. It gets only a few environment variables (no token), limits on memory and file
sizes and, if the kernel allows this to an ordinary user, no network. It does not stop an attacker: it runs as the
trainer's user and can read the trainer's files.

Arguments are sent to it as pickles. Answers are JSON lines, because data from untrusted code must not be unpickled.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import logging
import os
import pickle
import resource
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Any

from tandem_protocol import logs
from tandem_protocol.logs import LOG_ENV
from tandem_protocol.once import warn_once
from tandem_protocol.printed import capture_output
from tandem_protocol.processes import die_with_parent

from ..functions import CallFailed, check_rewards, describe_error, load_function

log = logging.getLogger(__name__)

ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", LOG_ENV)
"""The only variables of the trainer's environment that the process gets."""
LIMITS_BYTES = {resource.RLIMIT_AS: 4 << 30, resource.RLIMIT_FSIZE: 1 << 30, resource.RLIMIT_CORE: 0}
"""Address space of each process, size of each file it writes, core dumps."""
START_TIMEOUT_S = 120.0
"""Time limit for importing the function's module."""
_MAX_ANSWER_BYTES = 1 << 20
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


class Sandbox:
    """Calls one function in its own process, one call at a time."""

    def __init__(self, function: str, arguments: Mapping[str, Any], *, timeout_s: float) -> None:
        self._function = function
        self._arguments = dict(arguments)
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._process: Process | None = None
        self._warned = False

    async def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Call the function and return its result. Waiting for earlier calls does not count for the deadline.

        Raises:
            CallFailed: the function raised, its process died, or it was killed at the deadline.
        """
        async with self._turn:
            try:
                if self._process is None:
                    await self._start()
                return await self._ask(arguments, self._timeout_s)
            except BaseException:  # also when the caller is cancelled: a late answer would be taken for the next one
                await self.close()
                raise

    async def close(self) -> None:
        """Kill the process and all processes that it started."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _start(self) -> None:
        kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__,
            stdin=PIPE,
            stdout=PIPE,
            env={**kept, "HOME": tempfile.gettempdir()},
            start_new_session=True,
            limit=_MAX_ANSWER_BYTES,
        )
        without_network = await self._ask((self._function, self._arguments), START_TIMEOUT_S)
        if not without_network and not self._warned:
            self._warned = True
            message = (
                f"reward function {self._function}: its sandbox shares the trainer's network, because this machine "
                "does not let an ordinary user create a network namespace. Fix: run the trainer in an internal "
                "network, as compose.yaml does"
            )
            warn_once(log, message)

    async def _ask(self, message: Any, timeout_s: float) -> Any:
        assert self._process is not None, "started before"
        assert self._process.stdin is not None, "a pipe"
        assert self._process.stdout is not None, "a pipe"
        try:
            async with asyncio.timeout(timeout_s):
                with suppress(ConnectionError):  # it died; the missing answer says so
                    self._process.stdin.write(pickle.dumps(message))
                    await self._process.stdin.drain()
                line = await self._process.stdout.readline()
                code = await self._process.wait() if not line else None
        except TimeoutError:
            raise CallFailed(f"no answer within {timeout_s:g} s; its sandbox was killed") from None
        if code is not None:
            raise CallFailed(f"its sandbox ended with exit code {code} before it answered")
        try:
            answer = json.loads(line)
            error, value = answer["error"], answer["value"]
        except (ValueError, KeyError, TypeError):
            raise CallFailed(f"its sandbox answered {line[:100]!r}") from None
        if error is not None:
            raise CallFailed(f"{error}, in its sandbox")
        return value


def main() -> None:
    """Run in the child process: load one function, then answer calls until the trainer closes the pipe."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints goes to the trainer's log
    if os.environ.get(LOG_ENV):
        logs.configure()
        capture_output()
    die_with_parent()
    for limit, size_bytes in LIMITS_BYTES.items():
        resource.setrlimit(limit, (size_bytes, size_bytes))
    without_network = ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0

    def answer(value: Any, error: str | None = None) -> None:
        answers.write(json.dumps({"value": value, "error": error}) + "\n")
        answers.flush()

    function = None
    runner = asyncio.Runner()  # one event loop for all calls, because a function may keep a client that belongs to it
    while True:
        try:
            message = pickle.load(requests)  # noqa: S301 - sent by the trainer
        except EOFError:
            return
        try:
            if function is None:
                function = load_function("reward function", *message)
                answer(without_network)
            else:
                size = len(message["completions"])  # the function may change the list
                result = function(**message)
                if inspect.isawaitable(result):
                    result = runner.run(_awaited(result))
                answer(check_rewards(result, size))
        except (Exception, SystemExit) as error:
            answer(None, describe_error(error))


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


if __name__ == "__main__":
    main()
