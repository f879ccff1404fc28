"""A run that nobody watches: the documented systemd unit, faults at intervals, and what must be true at the end."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import docker
import yaml
from docker.models.containers import Container

from support.faults import FAULTS, Target, endless
from support.projects import write_project
from support.stack import ROOT, Stack

UNIT = re.compile(r"^ExecStart=/opt/tandem/(scripts/up)$", re.M)
STEP = re.compile(r"INFO +step (\d+)/")
NEVER_AGAIN = (0, 2)
"""Exit statuses after which the documented unit does not start the run again."""
START_TIMEOUT_S = 180.0
RECOVERY_TIMEOUT_S = 400.0
"""A run that makes no step for so long after a fault has failed. More than `rollout.stall_timeout_s`."""
OVERRIDE = {
    "volumes": {
        name: {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": f"size={size},uid=10001,gid=10001,mode=0750"}}
        for name, size in (("runs", "128m"), ("weights", "16m"))
    }
}
"""Volumes that are small enough to be filled in a moment."""


@dataclass
class Happened:
    """A fault that happened. Times are Unix seconds."""

    kind: str
    began_s: float
    ended_s: float = 0.0


@dataclass(frozen=True)
class Line:
    """A line of a service's log."""

    at_s: float
    service: str
    text: str


class Unit:
    """Does what systemd does with the unit in docs/deploy/containers.md, with a shorter pause between two starts."""

    def __init__(self, stack: Stack, log: Path, *, restart_s: float, scale: int, starts: int = 1000) -> None:
        self.exits: list[int] = []
        self._stack = stack
        self._log = log
        self._restart_s = restart_s
        self._starts = starts
        command = UNIT.search((ROOT / "docs/deploy/containers.md").read_text())
        assert command, "the unit's ExecStart"
        self._script = ROOT / command[1]
        self._options = ("--no-build", "--scale", f"generator={scale}")
        self._up: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def is_active(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def kill(self) -> None:
        """Kill the script, as a power loss does."""
        if self._up and self._up.poll() is None:
            os.killpg(self._up.pid, signal.SIGKILL)

    def stop(self) -> None:
        self._stopping.set()
        self.kill()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        with self._log.open("ab") as log:
            for _ in range(self._starts):
                self._up = self._stack.run_script(self._script, *self._options, log=log)
                self.exits.append(self._up.wait())
                if self.exits[-1] in NEVER_AGAIN or self._stopping.wait(self._restart_s):
                    return


@dataclass
class Unattended:
    """A run under the unit, with a fault every `every_s` seconds."""

    folder: Path
    steps: int
    seed: int
    every_s: float
    lasts_s: float
    latency_s: float
    kinds: Sequence[str] = tuple(FAULTS)
    limit: int | None = None
    """Number of faults. None: until the run is over."""
    say: Any = print
    happened: list[Happened] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    _logs: dict[tuple[str, str], str] = field(default_factory=dict)
    """(service, container id) → log."""

    def run(self) -> None:
        """Start the run, cause faults until it is over, and collect its logs and its files into `folder`."""
        project = self._write_project()
        override = self.folder / "override.yaml"
        override.write_text(yaml.safe_dump(OVERRIDE))
        stack = Stack(project, replicas=2, variables={"TANDEM_WEIGHTS_SIZE": "16m"})
        stack.files = ("compose.yaml", str(override))
        stack.engine = docker.from_env(timeout=600)  # on a busy machine an answer may take a minute
        unit = Unit(stack, self.folder / "up.log", restart_s=min(30.0, self.every_s / 4), scale=2)
        try:
            stack.must("create", "--no-build", "--scale", "generator=2")
            with kept_volume(stack, "runs") as disk:
                unit.start()
                try:
                    self._cause_faults(stack, disk, unit)
                finally:
                    unit.stop()
                    self._collect(stack, disk)
        finally:
            self.exits = unit.exits
            stack.stop()

    def _write_project(self) -> Path:
        project = write_project(self.folder / "project")
        config = yaml.safe_load((project / "config.yaml").read_text())
        config["generator"]["mock"] = {"faults": {"latency_s": self.latency_s}}
        config["trainer"] |= {
            "max_steps": self.steps,
            "log_completions": 4,
            "checkpoint": {"every_steps": 20},
            "eval": {"prompts": {"source": "prompts.jsonl", "column": "prompt", "limit": 2}, "every_steps": 20},
            "prompts": {"source": "prompts.jsonl", "column": "prompt"},
        }
        (project / "config.yaml").write_text(yaml.safe_dump(config))
        return project

    def _cause_faults(self, stack: Stack, disk: Container, unit: Unit) -> None:
        chance = random.Random(self.seed)
        kinds = endless(self.kinds, self.seed)
        wait_for_step(stack, unit, since_s=0.0, timeout_s=START_TIMEOUT_S)
        while True:
            pause_until = time.monotonic() + self.every_s
            while unit.is_active and time.monotonic() < pause_until:
                time.sleep(0.2)
            if not unit.is_active:
                return
            if len(self.happened) == self.limit:
                continue
            self._read_logs(stack)
            now = Happened(next(kinds), time.time())
            self.happened.append(now)

            def cut_power() -> None:
                unit.kill()
                for container in stack.running():
                    container.kill()

            replica = chance.choice(stack.containers("generator"))
            FAULTS[now.kind].apply(Target(stack, disk, replica, self.lasts_s, cut_power))
            now.ended_s = time.time()
            wait_for_step(stack, unit, since_s=now.ended_s, timeout_s=RECOVERY_TIMEOUT_S)
            wait_for_replicas(stack, unit)
            self.say(f"{len(self.happened):3} {now.kind:22} next step after {time.time() - now.ended_s:5.1f} s")

    def _collect(self, stack: Stack, disk: Container) -> None:
        self._read_logs(stack)
        for service in ("generator", "trainer"):
            for container in stack.containers(service):
                self.states[str(container.name)] = container.attrs["State"]
        for (service, container_id), text in self._logs.items():
            (self.folder / f"{service}-{container_id[:12]}.log").write_text(text)
            self.lines += [parse(line, service) for line in text.splitlines()]
        self.lines = sorted((line for line in self.lines if line.at_s), key=lambda line: line.at_s)
        (self.folder / "faults.json").write_text(json.dumps([vars(fault) for fault in self.happened], indent=1))
        copy_folder(disk, "/runs", self.folder)

    def _read_logs(self, stack: Stack) -> None:
        """Read all logs again. Those of a container that no longer exists stay as they were read last."""
        for service in ("generator", "trainer"):
            for container in stack.containers(service):
                text = container.logs(timestamps=True).decode(errors="replace")
                self._logs[service, str(container.id)] = text


def wait_for_step(stack: Stack, unit: Unit, *, since_s: float, timeout_s: float) -> None:
    """Wait until the trainer logs a step after `since_s`, or the run is over."""
    deadline = time.monotonic() + timeout_s
    while unit.is_active:
        lines = stack.container("trainer").logs(timestamps=True, tail=30).decode(errors="replace").splitlines()
        if any(line.at_s > since_s and STEP.search(line.text) for line in (parse(text, "trainer") for text in lines)):
            return
        assert time.monotonic() < deadline, f"no step for {timeout_s} s; the log ends with\n" + "\n".join(lines)
        time.sleep(0.5)


def wait_for_replicas(stack: Stack, unit: Unit) -> None:
    """Wait until all generators run, or the run is over."""
    deadline = time.monotonic() + RECOVERY_TIMEOUT_S
    while unit.is_active and any(replica.status != "running" for replica in stack.containers("generator")):
        assert time.monotonic() < deadline, f"a generator does not run for {RECOVERY_TIMEOUT_S} s"
        time.sleep(0.5)


def parse(text: str, service: str) -> Line:
    """Read a line of `docker logs --timestamps`."""
    stamp, _, message = text.partition(" ")
    try:
        at_s = datetime.fromisoformat(stamp[:26].rstrip("Z") + "+00:00").timestamp()
    except ValueError:  # a part of a long line
        return Line(0.0, service, text)
    return Line(at_s, service, message)


@contextmanager
def kept_volume(stack: Stack, volume: str) -> Iterator[Container]:
    """Hold a volume in memory, so that it outlives the services, as a disk does."""
    holder = stack.engine.containers.run(
        stack.container("trainer").image,
        ["infinity"],
        entrypoint="sleep",
        name=f"{stack.name}-disk",
        network_mode="none",
        volumes={f"{stack.name}_{volume}": {"bind": f"/{volume}", "mode": "rw"}},
        detach=True,
    )
    try:
        yield holder
    finally:
        holder.remove(force=True)


def copy_folder(container: Container, source: str, target: Path) -> None:
    """Copy a folder out of a container."""
    chunks, _ = container.get_archive(source)
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        # Python 3.11 has no argument for the filter before 3.11.4.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(target)
