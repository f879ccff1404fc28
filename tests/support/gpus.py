"""A host with GPUs, as its tools would show it."""

from __future__ import annotations

import shlex
from pathlib import Path


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
