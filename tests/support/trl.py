"""Run TRL scripts in Python environments that have TRL. `TANDEM_TRL` names their interpreters, separated by colons."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from support.generators import TOKEN
from tandem_protocol.store import WeightStore

if TYPE_CHECKING:
    from torch import Tensor

PYTHONS = tuple(path for path in os.environ.get("TANDEM_TRL", "").split(":") if path)
SCRIPT = Path(__file__).with_name("trl_script.py")
_TIMEOUT_S = 240


def missing() -> str | None:
    return None if PYTHONS else "TANDEM_TRL names no Python interpreter that has TRL"


def environment(weights_dir: Path) -> dict[str, str]:
    return {
        **os.environ,
        "TANDEM_TOKEN": TOKEN,
        "TANDEM__SHARED__WEIGHTS_DIR": str(weights_dir),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def start(python: str, weights_dir: Path, *arguments: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start the script with `python -m tandem_trainer.trl`, or with another launcher of modules."""
    command = [python, *(launcher or ["-m"]), "tandem_trainer.trl", str(SCRIPT), *arguments]
    return subprocess.Popen(
        command, env=environment(weights_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(python: str, weights_dir: Path, *arguments: str, launcher: Sequence[str] = ()) -> tuple[int, str]:
    """Run the script to its end. Returns its exit status and its output."""
    return finish(start(python, weights_dir, *arguments, launcher=launcher))


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=_TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, output


def newest(weights_dir: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the newest version in the store, and its tensors."""
    from safetensors.torch import load_file  # imports torch, which most tests do not need

    store = WeightStore(weights_dir)
    version = store.latest()
    assert version is not None
    (shard,) = store.directory(version).glob("*.safetensors")
    return str(version), load_file(shard)
