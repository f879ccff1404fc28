"""Simulated GPUs: a fake nvidia-smi, and harmless devices for the Docker engine."""

from __future__ import annotations

import fcntl
import json
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GPUS = 8
SPEC = {
    "cdiVersion": "0.5.0",
    "kind": "nvidia.com/gpu",
    "devices": [
        {
            "name": str(index),
            "containerEdits": {
                # /dev/null under another name
                "deviceNodes": [{"path": f"/dev/nvidia{index}", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666}]
            },
        }
        for index in range(GPUS)
    ],
}
"""A CDI specification of `nvidia.com/gpu=0` to `7`."""


class NvidiaSmi:
    """A fake program `nvidia-smi` in `folder`, the only folder on PATH. It does not exist until a method is called."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "nvidia-smi"

    def says(self, text: str, *, exit_code: int = 0) -> None:
        """Let it print `text` and end with `exit_code`."""
        self._write(f"echo {shlex.quote(text)}; exit {exit_code}")

    def hangs(self) -> None:
        """Let it run for a minute without output."""
        self._write("exec /bin/sleep 60")

    def _write(self, body: str) -> None:
        self._program.write_text(f"#!/bin/sh\n{body}\n")
        self._program.chmod(0o755)


@contextmanager
def cdi_gpus(folder: Path) -> Iterator[None]:
    """Declare `GPUS` harmless device nodes to the Docker engine. `folder` is one of its folders for CDI specifications.

    Waits for other test processes that do the same: two specifications of one device cancel each other.
    """
    with (Path(tempfile.gettempdir()) / "tandem-test-cdi.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        spec = folder / "tandem-test.json"
        spec.write_text(json.dumps(SPEC))
        try:
            yield
        finally:
            spec.unlink()
            if not existed:
                folder.rmdir()
