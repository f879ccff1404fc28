"""The generator exits with status 2 and a message if vLLM cannot serve the model here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.architectures import make_architecture
from support.models import make_tiny_model
from support.ports import free_port

pytestmark = pytest.mark.vllm


def start(model: Path, folder: Path, **env: str) -> tuple[int, str]:
    """Start a generator that ends by itself. Return its exit status and its last error."""
    command = [sys.executable, "-m", "tandem_generator", "--model", str(model), "--weights-dir", str(folder / "w")]
    command += ["--port", str(free_port()), "--enforce-eager", "--dtype", "float32", "--block-size", "32"]
    ended = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=180)
    # On a busy machine, Python's resource tracker may add a warning at the very end.
    *_, last = (line for line in ended.stderr.splitlines() if " ERROR " in line)
    return ended.returncode, last


def test_multi_head_latent_attention_is_refused_before_the_generator_is_ready(tmp_path: Path) -> None:
    model = make_architecture(tmp_path / "model", "deepseek_v2")
    status, error = start(model, tmp_path, VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert status == 2
    assert f" ERROR    shared.model: '{model}' uses multi-head latent attention (DeepSeek-V2, V3). With vLLM's" in error
    assert "Fix: choose another shared.model" in error


def test_too_little_memory_is_the_reason_in_the_last_error(tmp_path: Path) -> None:
    """The engine is another process, so the server's own exception does not have the reason."""
    status, error = start(make_tiny_model(tmp_path / "model"), tmp_path, VLLM_CPU_KVCACHE_SPACE="100000")
    assert status == 1, "there may be enough memory later"
    assert "cannot load shared.model" in error
    assert "less than requested memory for kv (100000.0 GiB)" in error
