"""Run TRL scripts in the environments of `make trl`, one for each version of TRL."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.version import Version as Release

from support.generators import TOKEN
from tandem_protocol.store import WeightStore

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[2]
PYTHONS = {
    path.parents[1].name: path
    for path in sorted(ROOT.glob(".venv-trl/*/bin/python"), key=lambda path: Release(path.parents[1].name))
}
"""Version of TRL → interpreter, oldest first."""
EACH_VERSION = [pytest.param(path, id=version) for version, path in PYTHONS.items()] or [pytest.param(Path(), id="-")]
NEWEST = list(PYTHONS.values())[-1] if PYTHONS else Path()
SCRIPT = Path(__file__).with_name("trl_script.py")
_TIMEOUT_S = 240


def missing() -> str | None:
    return None if PYTHONS else "no version of TRL is installed; `make trl` does that"


def environment(weights_dir: Path) -> dict[str, str]:
    return {
        **os.environ,
        "TANDEM_TOKEN": TOKEN,
        "TANDEM__SHARED__WEIGHTS_DIR": str(weights_dir),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def start(
    python: Path, weights_dir: Path, *arguments: str, launcher: Sequence[str] = (), script: Path = SCRIPT
) -> subprocess.Popen[str]:
    """Start the script with `python -m tandem_trainer.trl`, or with another launcher of modules."""
    command = [python, *(launcher or ["-m"]), "tandem_trainer.trl", str(script), *arguments]
    return subprocess.Popen(
        command,
        env=environment(weights_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(python: Path, weights_dir: Path, *arguments: str, launcher: Sequence[str] = ()) -> tuple[int, str]:
    """Run the script to its end. Returns its exit status and its output."""
    return finish(start(python, weights_dir, *arguments, launcher=launcher))


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a script. A process that it leaves behind is an error, and killed."""
    try:
        output, _ = process.communicate(timeout=_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            raise AssertionError(f"a process of the script is left: {output}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def newest(weights_dir: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the newest version in the store, and its tensors."""
    from safetensors.torch import load_file  # imports torch, which most tests do not need

    store = WeightStore(weights_dir)
    version = store.latest()
    assert version is not None
    (shard,) = store.directory(version).glob("*.safetensors")
    return str(version), load_file(shard)
