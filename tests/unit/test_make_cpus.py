"""`make up` gives both services all CPUs if they take turns, and else half of them each."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOW = ("--eval=up: show", "--eval=show: ; +@echo CPUS: $$TANDEM_GENERATOR_CPUS $$TANDEM_TRAINER_CPUS")


def cpus(*arguments: str, **env: str) -> list[str]:
    """Return the CPU sets of generator and trainer, with 8 CPUs. Nothing is started."""
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")} | env
    done = subprocess.run(
        ["make", "--dry-run", *SHOW, "up", *arguments], cwd=ROOT, env=chosen, text=True, capture_output=True, check=True
    )
    return next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CPUS: "))


@pytest.fixture(autouse=True)
def _eight_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nproc").write_text("#!/bin/sh\necho 8\n")
    (tmp_path / "bin/nproc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("trainer: {max_steps: 3}\n", ["0-3", "4-7"]),
        ("trainer: {max_steps: 3, max_lag: 1}\n", ["0-3", "4-7"]),
        ("trainer: {max_steps: 3, max_lag: 0}\n", ["0-7", "0-7"]),
        ("trainer:\n  max_lag: 0  # on-policy\n", ["0-7", "0-7"]),
        ("trainer:\n  # max_lag: 0\n  max_lag: 2\n", ["0-3", "4-7"]),
    ],
)
def test_services_share_all_cpus_only_if_the_project_has_no_lag(
    tmp_path: Path, config: str, expected: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert cpus(f"PROJECT={tmp_path}") == expected


def test_a_script_shares_all_cpus_with_its_generator() -> None:
    assert cpus("PROJECT=examples/trl", "SCRIPT=train.py") == ["0-7", "0-7"]


def test_chosen_cpus_win(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_lag: 0}\n")
    assert cpus(f"PROJECT={tmp_path}", TANDEM_GENERATOR_CPUS="1", TANDEM_TRAINER_CPUS="2") == ["1", "2"]
    assert cpus(f"PROJECT={tmp_path}", TANDEM_TRAINER_CPUS="4-5") == ["0-3", "4-5"], (
        "one that is chosen is not overlapped"
    )
