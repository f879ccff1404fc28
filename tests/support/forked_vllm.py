"""Start real vLLM generators in seconds: they are forked from a process that has imported vLLM.

The process runs one generator at a time. It reads a line with the arguments of the next one, forks it, and answers with
two lines: its process id, and at its end its exit status.
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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from support.generators import ENV, START_TIMEOUT_S

TESTS = str(Path(__file__).parents[1])
PROGRAM = f"import sys; sys.path.insert(0, {TESTS!r}); import support.forked_vllm as f; f.main()"
MODULES = (
    "support.publish_faults",
    "tandem_generator.vllm_server", "tandem_generator.volume_engine", "tandem_generator.vllm_worker",
    "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama", "transformers.models.llama.modeling_llama",
)  # fmt: skip


class Forked:
    """A generator. Its methods are those of `subprocess.Popen`."""

    def __init__(self, answers: IO[bytes]) -> None:
        self._answers = answers
        self.pid = int(self._line(START_TIMEOUT_S, is_needed=True))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.wait(0.0, is_needed=False)

    def wait(self, timeout: float = 60.0, *, is_needed: bool = True) -> int | None:
        if self.returncode is None and (line := self._line(timeout, is_needed=is_needed)):
            self.returncode = int(line)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def _line(self, timeout: float, *, is_needed: bool) -> bytes:
        if select.select([self._answers], [], [], timeout)[0]:
            return self._answers.readline()
        if is_needed:
            raise TimeoutError(f"the process of the generators did not answer within {timeout} s")
        return b""


class VllmFork:
    """The process that has imported vLLM. Its `spawn` is for `Generator`, whose program is `run_generator`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | ENV,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # `select` does not know of lines in a buffer
        )

    def spawn(self, command: Sequence[str], log: Path) -> Forked:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([str(log), *command[1:]]).encode() + b"\n")
        return Forked(self._process.stdout)

    def close(self) -> None:
        """End the process. The generator must have ended."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Fork a generator for each line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else may print between the answers
    for module in MODULES:
        importlib.import_module(module)
    # vLLM would spawn the engine's process. That takes longer, and it would not have the faults.
    vars(sys.modules["vllm.v1.engine.utils"])["get_mp_context"] = partial(multiprocessing.get_context, "fork")
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        if (child := os.fork()) == 0:
            answers.close()
            _run(log, arguments)
        print(child, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)


def _run(log: str, arguments: list[str]) -> None:
    from support.publish_faults import run_generator

    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)):
            os.dup2(descriptor, target)
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
