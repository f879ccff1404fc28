"""The tests and measurements for GPUs run here too, on the CPU with a tiny model, so that they still work on a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300
INSTALLED = ("torch", "transformers", "accelerate", "safetensors")
"""What the machine with the GPU has. scripts/gpu_bundle brings the other packages."""


def _site(folder: Path, bundled: list[str]) -> Path:
    """Return a folder with links to `INSTALLED`, what they need, and the `bundled` packages: nothing else."""
    found: dict[str, Distribution] = {}
    left = [*INSTALLED, *bundled]
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        if name not in bundled:
            needs = map(Requirement, found[name].requires or [])
            left += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    for package in found.values():
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(package.locate_file(top)))
    return folder


def _run(*command: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # CI's choice of tests
    env = {**inherited, "TANDEM_GPU": "cpu", "OMP_NUM_THREADS": "1", "OUT": str(tmp_path), **env}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_each_case_is_measured_with_the_packages_of_a_bundle(tmp_path: Path):
    script = (ROOT / "scripts/gpu_bundle").read_text()
    (bundled,) = re.findall(r'^PACKAGES="([^"]+)"', script, re.MULTILINE)
    site = tmp_path / "site"
    site.mkdir()
    sources = [*sorted((ROOT / "services").iterdir()), ROOT / "cli"]
    path = os.pathsep.join(map(str, [*sources, _site(site, bundled.split())]))
    bench = ["tests/bench/gpu.py", "--tiny", "--folder", str(tmp_path)]
    done = _run("-S", *bench, tmp_path=tmp_path, PYTHONPATH=path)  # -S: without the packages of this Python
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in (tmp_path / "bench-gpu.jsonl").read_text().splitlines()]
    expected = ["machine", "phases", "compare", "profile", *["update"] * 6, "publish", "delta"]
    assert [case["case"].split()[0] for case in cases] == expected
    assert not [case for case in cases if case.keys() & {"failed", "skipped"}], done.stderr[-3000:]
    published, delta = cases[-2:]
    assert delta["generator"] == "mock"
    assert 0 < delta["delta_bytes_per_bytes"] < 0.05
    assert published["generator"] == "mock"
    for kind in ("", "behind_"):
        phases = ("gather", "copy", "write", "commit", "visible", "verify", "pause", "load")
        parts = sum(published[f"{kind}{phase}_s"] for phase in phases)
        assert 0 < parts <= 1.5 * published[f"{kind}total_s"], "each part is the median of its own rounds"


def test_a_case_that_fails_does_not_end_the_measurements(tmp_path: Path):
    done = _run("tests/bench/gpu.py", "--shapes", "none", "tiny", "--only", "publish", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in (tmp_path / "bench-gpu.jsonl").read_text().splitlines()]
    assert [case["case"] for case in cases if "failed" in case] == ["publish none"]
    assert cases[-1]["case"] == "publish tiny"


@pytest.mark.parametrize("file", ["test_updates.py", "test_weights.py"])
def test_tests_for_gpus_pass_on_the_cpu_without_the_other_test_requirements(file: str, tmp_path: Path):
    chosen = "dapo-bfloat16 or online or published or deterministic"
    arguments = ["-m", "pytest", "-c", "tests/gpu/alone.ini", f"tests/gpu/{file}", "-q", "-k", chosen]
    done = _run(*arguments, tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
