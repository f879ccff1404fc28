"""What scripts/gpu_bundle packs, with a stand-in for pip."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("trainer-cuda", "generator-mock", "cli", "dev")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script, the locks, one source file and a Python that notes its arguments."""
    files = ["scripts/gpu_bundle", *(f"docker/requirements/{lock}.txt" for lock in LOCKS)]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("services", "cli", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "source.py").touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n')
    python.chmod(0o755)
    for arguments in (["init", "--quiet"], ["add", "services", "cli", "tests"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


def bundle(checkout: Path) -> subprocess.CompletedProcess[str]:
    command = [str(checkout / "scripts/gpu_bundle"), str(checkout / "out")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_packages_of_the_locks_are_downloaded_with_the_pip_of_the_checkout(checkout: Path) -> None:
    done = bundle(checkout)
    assert done.returncode == 0, done.stderr
    arguments = (checkout / "arguments").read_text().split()
    (packages,) = re.findall(r'^PACKAGES="([^"]+)"', (ROOT / "scripts/gpu_bundle").read_text(), re.MULTILINE)
    pins = [one for one in arguments if "==" in one]
    assert [pin.partition("==")[0] for pin in pins] == packages.split()
    locked = {line.split()[0] for lock in LOCKS for line in _lock(checkout, lock).splitlines() if "==" in line}
    assert {*pins} <= locked
    assert (checkout / "out/services/source.py").exists()


def test_a_package_that_is_not_locked_is_named(checkout: Path) -> None:
    for lock in LOCKS:
        text = re.sub(r"^xxhash==.*$", "", _lock(checkout, lock), flags=re.MULTILINE)
        (checkout / f"docker/requirements/{lock}.txt").write_text(text)
    done = bundle(checkout)
    assert done.returncode == 1
    assert "xxhash is not in the locks" in done.stderr
    assert not (checkout / "out").exists()


def _lock(checkout: Path, name: str) -> str:
    return (checkout / f"docker/requirements/{name}.txt").read_text()
