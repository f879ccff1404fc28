"""The packages of a project are installed for the image offline, and no package of Tandem changes its version."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from support.wheels import make_wheel

SCRIPT = Path(__file__).parents[2] / "docker/install_project.py"
NUMPY = version("numpy")
Install = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """The folder of wheels: `beta` needs `alpha`, `old` needs an older numpy, `incomplete` needs a missing package."""
    for name, *requires in (["alpha"], ["beta", "alpha"], ["old", "numpy<1"], ["incomplete", "not-there"]):
        make_wheel(tmp_path / "wheels", name, *requires)
    return tmp_path / "wheels"


@pytest.fixture
def install(wheels: Path, tmp_path: Path) -> Install:
    def run(text: str | None, *name: str, file: str = "requirements.txt") -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "requirements"
        folder.mkdir(exist_ok=True)
        if text is not None:
            (folder / file).write_text(text)
        return subprocess.run(
            [sys.executable, str(SCRIPT), str(folder), str(tmp_path / "target"), *name],
            env={**os.environ, "PIP_FIND_LINKS": str(wheels), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def modules(tmp_path: Path) -> set[str]:
    return {path.stem for path in (tmp_path / "target").rglob("*.py")}


def test_only_packages_that_the_image_lacks_are_installed(install: Install, tmp_path: Path) -> None:
    done = install("beta\nnumpy>=1\n")
    assert done.returncode == 0, done.stderr
    assert modules(tmp_path) == {"alpha", "beta"}


def test_a_lock_with_hashes_is_verified_and_may_leave_out_dependencies(
    install: Install, wheels: Path, tmp_path: Path
) -> None:
    digest = hashlib.sha256((wheels / "incomplete-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    done = install(f"incomplete==1.0 --hash=sha256:{digest}\n")
    assert done.returncode == 0, done.stderr
    assert modules(tmp_path) == {"incomplete"}
    done = install(f"alpha==1.0 --hash=sha256:{'0' * 64}\n")
    assert done.returncode == 2
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stdout


@pytest.mark.parametrize("text", ["old\n", "numpy==1.0\n", f"old\n--find-links .\nnumpy=={NUMPY}\n"])
def test_a_conflict_with_a_package_of_tandem_names_it_and_its_version(
    install: Install, tmp_path: Path, text: str
) -> None:
    done = install(text)
    assert done.returncode == 2
    assert f"numpy (the image has {NUMPY})" in done.stderr.splitlines()[-1]
    assert modules(tmp_path) == set()


def test_a_package_that_cannot_be_found_is_an_error(install: Install) -> None:
    done = install("not-there\n")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: pip cannot install requirements.txt")


def test_nothing_is_installed_without_requirements(install: Install, tmp_path: Path) -> None:
    assert install(None).returncode == 0
    assert install(None, "").returncode == 0
    assert [*(tmp_path / "target").iterdir()] == []


def test_another_file_may_be_named_and_must_exist(install: Install, tmp_path: Path) -> None:
    assert install("alpha\n", "deps/packages.txt", file="packages.txt").returncode == 0
    assert modules(tmp_path) == {"alpha"}
    done = install(None, "/srv/absent.txt")
    assert done.returncode == 2
    assert "TANDEM_REQUIREMENTS=/srv/absent.txt, expected a file in the project's folder" in done.stderr
