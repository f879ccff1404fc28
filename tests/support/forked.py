"""Start real trainer processes in about a second: they are forked from a process that has imported everything."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from support.generators import TOKEN

END_TIMEOUT_S = 30.0
MAINS = {"tandem_trainer": "tandem_trainer.__main__", "tandem_trainer.launch": "tandem_trainer.launch"}
"""Name behind `python -m` → module with its `main`."""
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    ["tandem_trainer.process", "tandem_trainer.several", "transformers.models.llama.modeling_llama"]
)
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH_", "OMP_", "PYTHON")
"""How variables begin that have no effect on a forked process, because libraries have read them."""


class _Detachable(Protocol):
    def detach(self) -> int: ...


class Output:
    """A file that a forked process writes to."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[_Detachable], Output], tuple[Any]]:
        return _received, (reduction.DupFd(self.descriptor),)


def _received(duplicate: _Detachable) -> Output:
    return Output(duplicate.detach())


class Forked:
    """A process that does what `python -m MODULE ARGUMENTS` does, with the methods of `subprocess.Popen` that are used.

    The processes that it starts are forked, too. Their parent is the process that has imported everything, so they do
    not die with the one that started them. All have the same seed of hashes, so a result that depends on the order of a
    set would be the same in two of them; the tests in containers start interpreters of their own.
    """

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        *,
        start_new_session: bool = False,
    ) -> None:
        module, arguments = split(args)
        outputs = Output(stdout.fileno() if stdout else 1), Output(stderr.fileno() if stderr else 2)
        target = module, arguments, dict(os.environ if env is None else env), *outputs, start_new_session
        self._process = forkserver.Process(target=_run, args=target)
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked trainer", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """End the process and those that it has started, if they still run."""
        self.terminate()
        self._process.join(END_TIMEOUT_S)
        self.kill()


def split(command: Sequence[str]) -> tuple[str, list[str]]:
    """Return the module and the arguments of `python -m MODULE ARGUMENTS`."""
    options, module = command.index("-m"), command[command.index("-m") + 1]
    assert command[0] == sys.executable
    assert {*command[1:options]} <= {"-u"}
    assert module in MAINS, f"{module} cannot be forked, only one of {', '.join(MAINS)}"
    return module, [*command[options + 2 :]]


def _run(module: str, arguments: list[str], env: dict[str, str], out: Output, error: Output, session: bool) -> NoReturn:
    """Be the process: what an interpreter sets up, and then the module's `main`."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from tandem_trainer import supervise

    if session:
        os.setsid()
    for descriptor, output in ((1, out), (2, error)):
        os.dup2(output.descriptor, descriptor)
        os.close(output.descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    # Only in this process: what starts a trainer's interpreter starts a process that has imported everything instead.
    vars(os)["execve"] = _become
    vars(supervise)["subprocess"] = _Subprocess
    vars(subprocess_handler)["Popen"] = Forked
    try:
        _become(sys.executable, [sys.executable, "-m", module, *arguments], env)
    finally:
        atexit._run_exitfuncs()


class _Subprocess:
    """What the supervisor uses of the module `subprocess`."""

    Popen = Forked
    TimeoutExpired = subprocess.TimeoutExpired


def _become(_path: str, command: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Take the place of `os.execve`."""
    given = dict(env)  # it may be os.environ
    os.environ.clear()
    os.environ.update(given)
    module, arguments = split(command)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(MAINS[module]).main())


def start_trainer(config: Path, log: Path, prepare: Callable[[], object] | None = None) -> ForkServerProcess:
    """Start a trainer in its own process, which calls `prepare` first. Its output is appended to `log`."""
    process = forkserver.Process(target=_train, args=(config, log, prepare))
    process.start()
    return process


def _train(config: Path, log: Path, prepare: Callable[[], object] | None) -> None:
    from tandem_trainer.__main__ import main  # imported only in the child, because it imports torch

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["TANDEM_TOKEN"] = TOKEN
    # One core, because threads that wait for each other would cost a tiny model seconds.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if prepare:
        prepare()
    sys.exit(main(["--config", str(config)]))
