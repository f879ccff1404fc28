"""A host with GPUs, as its tools and its Docker engine would show it."""

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
                # Nothing but /dev/null under another name.
                "deviceNodes": [{"path": f"/dev/nvidia{index}", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666}]
            },
        }
        for index in range(GPUS)
    ],
}
"""`nvidia.com/gpu=0` to `7` as CDI's specification has them."""


class NvidiaSmi:
    """Stands for the program `nvidia-smi` in a folder that is the whole PATH; there is none until it says something."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "nvidia-smi"

    def says(self, text: str, *, exit_code: int = 0) -> None:
        self._write(f"echo {shlex.quote(text)}; exit {exit_code}")

    def hangs(self) -> None:
        self._write("exec /bin/sleep 60")

    def _write(self, body: str) -> None:
        self._program.write_text(f"#!/bin/sh\n{body}\n")
        self._program.chmod(0o755)


@contextmanager
def cdi_gpus(folder: Path) -> Iterator[None]:
    """Let the engine hand out `GPUS` harmless device nodes; `folder` is one that it reads specifications in.

    Waits for another test process that does so: two specifications of one device cancel each other.
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
