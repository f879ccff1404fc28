"""Faults of a running compose stack, and what its logs must say about each of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from docker.models.containers import Container

from support.stack import Stack

SIGNAL = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    words = (folder / "cmdline").read_bytes().split(b"\\0")
    if b"tini" not in words[0] and b"{module}" in words:
        os.kill(int(folder.name), signal.{name})
"""
FILL = "dd if=/dev/zero of={folder}/filler bs=64k 2>/dev/null; true"
DAMAGE = """
import os, pathlib
for file in max(pathlib.Path("/weights/versions").glob("[0-9]*")).glob("*.safetensors"):
    file.chmod(0o600)
    os.truncate(file, file.stat().st_size - 1)
"""
LOST = r"waiting for generator|generator \S+ has left"
RESUMED = r"resumed from step \d+|the run in \S+ is finished"
READY = "ready, serving version"
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    title: str
    apply: Callable[[Target], None]
    """Causes the fault, and ends it where it lasts."""
    expected: Mapping[str, Sequence[str]]
    """Service → regular expressions. Each matches a line of the service's log after the fault began."""
    slow: bool = False
    """Whether requests hang as long as the fault lasts: a step is slow, and after 30 s the log says why."""


@dataclass
class Target:
    """The stack, one of its generators, and for how long a fault lasts."""

    stack: Stack
    disk: Container
    """Holds the runs volume, also while no service runs."""
    replica: Container
    lasts_s: float
    cut_power: Callable[[], None]
    """Kills the supervisor's `docker compose up` and all containers at once."""

    @property
    def trainer(self) -> Container:
        return self.stack.container("trainer")

    def wait(self) -> None:
        time.sleep(self.lasts_s)


def signal_process(container: Container, module: str, name: str = "SIGKILL") -> None:
    """Send a signal to the processes of a Python module in a container. The kernel kills when memory is short."""
    run(container, "python3", "-c", SIGNAL.format(module=module, name=name))


def run(container: Container, *command: str) -> None:
    """Run a command in a container. A container that is not running is left alone."""
    code, output = container.exec_run(list(command))
    assert code in (0, 137), output.decode()  # 137: the container ended with the process


@contextmanager
def paused(container: Container) -> Iterator[None]:
    container.pause()
    try:
        yield
    finally:
        container.unpause()


@contextmanager
def disconnected(stack: Stack, container: Container) -> Iterator[None]:
    network = stack.engine.networks.get(f"{stack.name}_rl")
    aliases = container.attrs["NetworkSettings"]["Networks"][network.name]["Aliases"]
    network.disconnect(container, force=True)
    try:
        yield
    finally:
        network.connect(container, aliases=aliases)


@contextmanager
def full(container: Container, folder: str) -> Iterator[None]:
    run(container, "sh", "-c", FILL.format(folder=folder))
    try:
        yield
    finally:
        run(container, "rm", "-f", f"{folder}/filler")


def _kill_generator_process(at: Target) -> None:
    signal_process(at.replica, "tandem_generator")


def _kill_generator(at: Target) -> None:
    at.replica.kill()
    at.wait()
    at.replica.start()


def _kill_generators(at: Target) -> None:
    replicas = at.stack.containers("generator")
    for replica in replicas:
        replica.kill()
    at.wait()
    for replica in replicas:
        replica.start()


def _pause_generator(at: Target) -> None:
    with paused(at.replica):
        at.wait()


def _disconnect_generator(at: Target) -> None:
    with disconnected(at.stack, at.replica):
        at.wait()


def _kill_trainer_process(at: Target) -> None:
    signal_process(at.trainer, "tandem_trainer")


def _kill_trainer(at: Target) -> None:
    at.trainer.kill()


def _pause_trainer(at: Target) -> None:
    with paused(at.trainer):
        at.wait()


def _disconnect_trainer(at: Target) -> None:
    with disconnected(at.stack, at.trainer):
        at.wait()


def _restart_everything(at: Target) -> None:
    at.stack.must("restart")


def _cut_power(at: Target) -> None:
    at.cut_power()


def _fill_runs(at: Target) -> None:
    with full(at.disk, "/runs"):
        at.wait()


def _fill_weights(at: Target) -> None:
    with full(at.trainer, "/weights"):
        at.wait()


def _damage_weights(at: Target) -> None:
    signal_process(at.trainer, "tandem_trainer", "SIGSTOP")  # otherwise a newer version would be there in a moment
    run(at.trainer, "python3", "-c", DAMAGE)
    began_s = time.time()
    signal_process(at.replica, "tandem_generator")
    while READY not in at.replica.logs(since=began_s).decode() and time.time() < began_s + START_TIMEOUT_S:
        time.sleep(0.2)
    signal_process(at.trainer, "tandem_trainer", "SIGCONT")


FAULTS = {
    "generator-process": Fault(
        "kill -9 of a generator's process", _kill_generator_process, {"trainer": [LOST], "generator": [READY]}
    ),
    "generator": Fault(
        "docker kill of a generator, started again later", _kill_generator, {"trainer": [LOST], "generator": [READY]}
    ),
    "generators": Fault(
        "docker kill of all generators, started again later",
        _kill_generators,
        {"trainer": [LOST, "answers again|has left"], "generator": [READY]},
    ),
    "pause-generator": Fault("a generator is paused", _pause_generator, {}, slow=True),
    "disconnect-generator": Fault("a generator loses its network", _disconnect_generator, {}, slow=True),
    "trainer-process": Fault(
        "kill -9 of the trainer's process",
        _kill_trainer_process,
        {"trainer": ["ended with exit status 137; starting it again", RESUMED]},
    ),
    "trainer": Fault("docker kill of the trainer", _kill_trainer, {"trainer": [RESUMED], "generator": [READY]}),
    "pause-trainer": Fault("the trainer is paused", _pause_trainer, {}, slow=True),
    "disconnect-trainer": Fault("the trainer loses its network", _disconnect_trainer, {}, slow=True),
    "restart": Fault(
        "docker compose restart of everything",
        _restart_everything,
        {"trainer": [r"stopped at step \d+ with a checkpoint", RESUMED], "generator": [READY]},
    ),
    "power": Fault(
        "power loss: everything is killed at once", _cut_power, {"trainer": [RESUMED], "generator": [READY]}
    ),
    "runs-disk": Fault("the runs volume is full", _fill_runs, {"trainer": ["cannot be written"]}),
    "weights-disk": Fault("the weights volume is full", _fill_weights, {"trainer": ["cannot publish"]}),
    "damaged-weights": Fault(
        "the newest weights are damaged, and a generator's process is killed",
        _damage_weights,
        {"generator": ["cannot start with version"]},
    ),
}


def endless(names: Sequence[str], seed: int) -> Iterator[str]:
    """Yield the names without end, in rounds: each name once per round, in an order that depends on `seed`."""
    chance = random.Random(seed)
    while True:
        yield from chance.sample(list(names), len(names))
