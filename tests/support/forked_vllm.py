"""Start real vLLM generators in seconds: they are forked from a process that has imported vLLM.

The process runs one generator at a time. It reads a line with the log, the environment and the arguments of the next
one, forks it, and answers with two lines: its process id, and at its end its exit status.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from support.generators import ENV, START_TIMEOUT_S
from tandem_generator.vllm_logging import configure_vllm_logging

TESTS = str(Path(__file__).parents[1])
PROGRAM = f"import sys; sys.path.insert(0, {TESTS!r}); import support.forked_vllm as f; f.main()"
MODULES = (
    "support.publish_faults", "tandem_generator.__main__",
    "tandem_generator.vllm_server", "tandem_generator.volume_engine", "tandem_generator.vllm_worker",
    "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama", "transformers.models.llama.modeling_llama",
)  # fmt: skip


class _Server:
    """The process that has imported vLLM. It ends when its input and its generator have."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | ENV,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # `select` does not know of lines in a buffer
        )

    def ask(self, *words: object) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(words).encode() + b"\n")

    def answer(self, timeout: float) -> int | None:
        """The next answer. None if there is none in time."""
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return None
        line = self._process.stdout.readline()
        assert line, "the process that forks vLLM has ended"
        return int(line)


_idle: list[_Server] = []


class Forked:
    """A generator. Its methods are some of those of `subprocess.Popen`."""

    def __init__(self, log: Path, command: Sequence[str]) -> None:
        self._server = _idle.pop() if _idle else _Server()
        self._server.ask(str(log), os.environ | ENV, command[1:])
        pid = self._server.answer(START_TIMEOUT_S)
        assert pid, f"no vLLM generator was forked within {START_TIMEOUT_S} s"
        self.pid = pid
        self.returncode: int | None = None

    def poll(self, timeout: float = 0.0) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.answer(timeout)
            if self.returncode is not None:
                _idle.append(self._server)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        if (status := self.poll(timeout)) is None:
            raise subprocess.TimeoutExpired("a forked generator", timeout)
        return status

    def terminate(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


def spawn(command: Sequence[str], log: Path) -> Forked:
    """Start a generator in its own session. Its output replaces the content of `log`.

    Args:
        command: The interpreter with `-m tandem_generator` and its arguments, or with the arguments of
            `support.publish_faults.run_generator`.
    """
    return Forked(log, command)


def main() -> None:
    """Fork a generator for each line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else may print between the answers
    configure_vllm_logging({})
    for module in MODULES:
        importlib.import_module(module)
    # vLLM would spawn the engine's process. That takes longer, and it would not have the faults.
    vars(sys.modules["vllm.v1.engine.utils"])["get_mp_context"] = partial(multiprocessing.get_context, "fork")
    for line in sys.stdin:
        log, env, arguments = json.loads(line)
        if (child := os.fork()) == 0:
            answers.close()
            _run(log, env, arguments)
        print(child, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)


def _run(log: str, env: Mapping[str, str], arguments: list[str]) -> None:
    from support.publish_faults import run_generator
    from tandem_generator.__main__ import main

    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)):
            os.dup2(descriptor, target)
        os.environ.clear()
        os.environ.update(env)
        if arguments[:2] == ["-m", "tandem_generator"]:
            sys.exit(main(arguments[2:]))
        sys.argv[1:] = arguments
        run_generator()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
