"""Runs `tandem demo` as a real process, and finds all its descendants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from support.models import make_tiny_model

FAKES = Path(__file__).parent / "fakes"
_MARK = "TANDEM_TEST_DEMO"


class Demo:
    """A running `tandem demo --plain`."""

    def __init__(self, project: Path, *arguments: str, **env: str) -> None:
        self.project = project
        self._mark = uuid.uuid4().hex
        self._errors = project / "stderr.txt"
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tandem_cli", "demo", str(project), "--plain", *arguments],
                env={**os.environ, "PYTHONPATH": str(FAKES), "PYTHONUNBUFFERED": "1", _MARK: self._mark, **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def run_dir(self) -> Path:
        return self.project / "runs" / "default"

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait_for_line(self, start: str) -> str:
        """Read its output up to the first line that begins with `start`, and return that line."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            if line.startswith(start):
                return line.rstrip("\n")
            seen.append(line)
        raise AssertionError(f"no line starts with {start!r}: {''.join(seen)}{self.errors}")

    def finish(self) -> str:
        """Wait until it ends, and return the rest of its output."""
        output, _ = self.process.communicate(timeout=60)
        return output

    def family(self) -> list[psutil.Process]:
        """Return all its living descendants, in any session."""
        return [p for p in psutil.process_iter() if self._is_marked(p)]

    def member(self, module: str) -> psutil.Process:
        """Return the process that runs `python -m module`."""
        (found,) = [p for p in self.family() if p.cmdline()[1:3] == ["-m", module]]
        return found

    def guard_of(self, module: str) -> psutil.Process:
        """Return the guard of the process that runs `python -m module`."""
        (found,) = [
            p for p in self.family() if p.cmdline()[1:3] == ["-m", "tandem_cli.guard"] and module in p.cmdline()
        ]
        return found

    def wait_until_nothing_is_left(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while left := self.family():
            if time.monotonic() > deadline:
                raise AssertionError(f"still there after {timeout_s} s: {[p.cmdline() for p in left]}")
            time.sleep(0.05)

    def _is_marked(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        return False


@contextmanager
def running_demo(project: Path, *arguments: str, **env: str) -> Iterator[Demo]:
    """Start a demo, and kill all its processes at the end."""
    demo = Demo(project, *arguments, **env)
    try:
        yield demo
    finally:
        for process in demo.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        demo.process.communicate()


def fake_project(folder: Path) -> Path:
    """Write a project for the fake services in `fakes`."""
    (folder / "config.yaml").write_text(
        "shared: {model: model}\n"
        "generator: {engine: mock, shutdown_timeout_s: 5}\n"
        "trainer: {max_steps: 3, start_timeout_s: 30, rewards: [{function: 'rewards:score'}]}\n"
    )
    return folder


_CONFIG = """\
shared: {model: model}
generator: {engine: mock, shutdown_timeout_s: 5}
trainer:
  max_steps: 3
  prompts: {source: prompts.jsonl}
  rewards: [{function: "rewards:even"}]
  rollout: {num_prompts: 4, num_generations: 4, max_completion_length: 8}
  optim: {learning_rate: 1.0e-3}
  eval: {prompts: {source: prompts.jsonl}}
"""
_REWARDS = '''\
def even(completion_ids, **columns):
    """Share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]
'''


def make_tiny_project(folder: Path) -> Path:
    """Write a project with a random model of about 20,000 parameters, twelve prompts, and a varying reward."""
    make_tiny_model(folder / "model")
    (folder / "config.yaml").write_text(_CONFIG)
    (folder / "rewards.py").write_text(_REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+{n}="}) + "\n" for n in range(12)))
    return folder
