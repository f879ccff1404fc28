"""The generator exits with status 2 and a message if vLLM cannot serve the model here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.architectures import make_architecture
from support.ports import free_port

pytestmark = pytest.mark.vllm


def test_multi_head_latent_attention_is_refused_before_the_generator_is_ready(tmp_path: Path) -> None:
    model = make_architecture(tmp_path / "model", "deepseek_v2")
    command = [sys.executable, "-m", "tandem_generator", "--model", str(model), "--weights-dir", str(tmp_path / "w")]
    command += ["--port", str(free_port()), "--enforce-eager", "--dtype", "float32", "--block-size", "32"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 2
    # On a busy machine, Python's resource tracker may add a warning at the very end.
    *_, last = (line for line in ended.stderr.splitlines() if " ERROR " in line)
    assert f" ERROR    shared.model: '{model}' uses multi-head latent attention (DeepSeek-V2, V3). With vLLM's" in last
    assert "Fix: choose another shared.model" in last
