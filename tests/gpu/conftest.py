"""Models for the tests on a GPU. `TANDEM_GPU=cpu` tries these tests on a machine without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the test with deterministic algorithms


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose random distributions have clear maxima."""
    from support import gpu
    from support.shapes import write_model

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "initializer_range": 0.05}
    return write_model("tiny", tmp_path_factory.mktemp("model"), gpu.device(), **sizes)
