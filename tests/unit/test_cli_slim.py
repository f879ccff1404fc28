"""The command line without the services: only the libraries that tandem-cli declares without an extra."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.stack import ROOT

OURS = {"tandem-cli": ROOT / "cli", "tandem-protocol": ROOT / "services/protocol"}
HEAVY = {"torch", "transformers", "vllm", "numpy", "matplotlib", "psutil", "testcontainers", "tandem_trainer"}
PROGRAM = """
import json, sys
from importlib.machinery import PathFinder
hidden, code = set(json.loads(sys.argv[1])), sys.argv[2]

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
exec(code)
"""
"""Hides modules as if they were not installed."""
TANDEM = "from tandem_cli.__main__ import main; sys.exit(main({words!r}))"


def declared(distribution: str, extras: Iterable[str] = ()) -> set[str]:
    """Return the names of the distributions that pip installs with `distribution`, itself included."""
    name = canonicalize_name(distribution)
    if name in OURS:
        project = tomllib.loads((OURS[name] / "pyproject.toml").read_text())["project"]
        texts = [*project["dependencies"], *(t for e in extras for t in project["optional-dependencies"][e])]
    else:
        texts = requires(name) or []
    found: set[str] = {name}
    for requirement in map(Requirement, texts):
        environments: list[dict[str, Any]] = [default_environment() | {"extra": extra} for extra in (*extras, "")]
        if not requirement.marker or any(requirement.marker.evaluate(env) for env in environments):
            found |= declared(requirement.name, requirement.extras)
    return found


def not_declared(extras: Iterable[str] = ()) -> set[str]:
    """Return the installed modules that `pip install tandem-cli[extras]` would not install."""
    installed: Mapping[str, list[str]] = packages_distributions()
    ours = declared("tandem-cli", extras)
    names = {module for module, owners in installed.items() if not ours & {canonicalize_name(o) for o in owners}}
    return (names | {"tandem_generator", "tandem_trainer"}) - {"tandem_cli", "tandem_protocol"}


def run(code: str, hidden: Iterable[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(sorted(hidden)), code]
    env = {"PYTHONPATH": ":".join(map(str, OURS.values())), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def tandem(*words: str, hidden: Iterable[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return run(TANDEM.format(words=words), hidden, folder)


@pytest.fixture(scope="module")
def hidden() -> set[str]:
    return not_declared()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("compose.yaml", "compose.gpu.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "examples/digits").mkdir(parents=True)
    shutil.copy(ROOT / "examples/digits/config.yaml", tmp_path / "examples/digits")
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5}\n')
    return tmp_path


def test_the_command_line_alone_installs_none_of_the_heavy_libraries(hidden: set[str]) -> None:
    assert hidden >= HEAVY


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("demo", "--help"),
        ("doctor", "--help"),
        ("completion", "bash"),
        ("runs", "examples/digits"),
        ("runs", "compare", "runs/a", "runs/b"),
        ("gpus", "--generator", "0", "--trainer", "1"),
    ],
    ids=" ".join,
)
def test_commands_work_with_the_declared_libraries_and_without_docker(
    hidden: set[str], checkout: Path, words: tuple[str, ...]
) -> None:
    done = tandem(*words, hidden=hidden | {"docker"}, folder=checkout)
    assert done.returncode == 0, done.stderr


def test_the_doctor_and_the_screen_work_with_the_declared_libraries(hidden: set[str], checkout: Path) -> None:
    done = tandem("doctor", "--json", hidden=hidden, folder=checkout)
    assert {finding["name"] for finding in json.loads(done.stdout)} >= {"engine", "configuration"}, done.stderr
    done = run("import tandem_cli.screen, tandem_cli.progress", hidden, checkout)
    assert done.returncode == 0, done.stderr


def test_a_plan_needs_only_the_declared_libraries(hidden: set[str], checkout: Path) -> None:
    costs = "{num_prompts: 2, num_generations: 2, lengths: [8], token_s: 0.1, update_s: 1.0}"
    (checkout / "costs.yaml").write_text(costs)
    done = tandem("plan", "--costs", "costs.yaml", "--devices", "3", hidden=hidden | {"docker"}, folder=checkout)
    assert "Recommended: 1 generator and 2 trainer devices" in done.stdout, done.stderr


def test_a_command_whose_libraries_are_missing_says_what_to_install(hidden: set[str], checkout: Path) -> None:
    done = tandem("demo", hidden=hidden, folder=checkout)
    assert done.returncode == 2
    assert "without matplotlib, psutil, tandem_generator, tandem_trainer" in done.stderr
    assert "Fix: run `make setup`" in done.stderr
    done = tandem("demo", hidden={"matplotlib"}, folder=checkout)
    assert "got an installation without matplotlib" in done.stderr
    done = tandem("watch", "runs/mine", hidden=hidden, folder=checkout)
    assert (done.returncode, 'Fix: pip install "tandem-cli[watch]"' in done.stderr) == (2, True)
    for suffix, extra in ((".html", "watch"), (".svg", "demo")):
        done = tandem("runs", "compare", "runs/a", "runs/b", "--save", f"x{suffix}", hidden=hidden, folder=checkout)
        assert (done.returncode, f'Fix: pip install "tandem-cli[{extra}]"' in done.stderr) == (2, True)
    done = run("import tandem_cli.testing", hidden, checkout)
    assert re.search(r"needs psutil, .* Fix: pip install \"tandem-cli\[testing\]\"", done.stderr)


def test_the_extras_have_what_their_modules_import(checkout: Path) -> None:
    done = run("import tandem_cli.testing", not_declared(["testing"]), checkout)
    assert done.returncode == 0, done.stderr
    code = "import tandem_cli.watch.command, tandem_cli.watch.server, plotly.io"
    done = run(code, not_declared(["watch"]), checkout)
    assert done.returncode == 0, done.stderr
    code = "import tandem_cli.demo, tandem_cli.service_commands, tandem_cli.summary, matplotlib.pyplot"
    done = run(code, not_declared(["demo"]), checkout)
    assert done.returncode == 0, done.stderr
