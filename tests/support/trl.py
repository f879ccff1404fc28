"""Run TRL scripts in the environments of `make trl`, one for each version of TRL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from packaging.version import Version as Release

from support.generators import TOKEN
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

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
RECORDED = Path(__file__).with_name("trl_recorded.py")
_TIMEOUT_S = 240


def missing() -> str | None:
    return None if PYTHONS else "no version of TRL is installed; `make trl` does that"


def make_readable(model: Path) -> Path:
    """Make the tiny model readable for old versions of transformers too."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


def start(
    python: Path,
    weights_dir: Path,
    *arguments: str,
    launcher: Sequence[str] = ("-m",),
    script: Path = SCRIPT,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Start the script with `python -m tandem_trainer.trl`, or with another launcher of modules."""
    return subprocess.Popen(
        [python, *launcher, "tandem_trainer.trl", script, *arguments],
        env={
            **os.environ,
            "TANDEM_TOKEN": TOKEN,
            "TANDEM__SHARED__WEIGHTS_DIR": str(weights_dir),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start_recorded(
    python: Path, weights_dir: Path, spans: Path, *arguments: str, launcher: Sequence[str] = ("-m",)
) -> tuple[subprocess.Popen[str], Callable[[], list[dict[str, Any]]]]:
    """Start the script, and also return a function that reads with which versions each step was sampled so far."""
    words = [str(spans), str(SCRIPT), *arguments]
    process = start(python, weights_dir, *words, launcher=launcher, script=RECORDED)
    return process, lambda: [json.loads(line) for line in spans.read_text().splitlines()] if spans.exists() else []


def run(python: Path, weights_dir: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    """Run the script to its end. Returns its exit status and its output."""
    return finish(start(python, weights_dir, *arguments, **options))


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill all processes of a script at the end of the block."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a script. Returns its exit status and its output. No process of it may be left."""
    with ended(process):
        output, _ = process.communicate(timeout=_TIMEOUT_S)
        left = [other.cmdline() for other in psutil.process_iter() if _group(other.pid) == process.pid]
        assert not left, output
    return process.returncode, output


def _group(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def tensors(store: WeightStore, version: Version) -> dict[str, Tensor]:
    """Return the tensors of a version."""
    from safetensors.torch import load_file  # imports torch, which most tests do not need

    (shard,) = store.directory(version).glob("*.safetensors")
    return load_file(shard)


def newest(weights_dir: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the newest version in the store, and its tensors."""
    store = WeightStore(weights_dir)
    version = store.latest()
    assert version is not None
    return str(version), tensors(store, version)
