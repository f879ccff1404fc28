"""Runs of TRL scripts with `tandem run`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil

from support import trl


class Run:
    """A running `tandem run --mock --plain` in a folder of its own."""

    def __init__(self, folder: Path, *words: str, python: Path = trl.NEWEST) -> None:
        self.folder = folder
        self._errors = folder / "stderr.txt"
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "tandem_cli", "run", "--mock", "--plain", *words],
                cwd=folder,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def records(self, name: str = "metrics") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"runs/train/{name}.jsonl").read_text().splitlines()]

    def finish(self) -> tuple[int, str]:
        """Return its exit status and output. No process of it may be left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        output, _ = self.process.communicate(timeout=120)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
        return self.process.returncode, output
