"""A trainer that fails is started again, as often as its checkpoints show that this helps. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tandem_trainer.supervise import newest_checkpoint

SUPERVISE = """
import logging, os, sys
from pathlib import Path
from tandem_trainer.supervise import Supervisor, newest_checkpoint
logging.basicConfig(level=logging.INFO, format="%(message)s")
run_dir, retries, script = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
supervisor = Supervisor([sys.executable, "-c", script, str(run_dir)], os.environ, retries=retries,
                        newest_checkpoint=lambda: newest_checkpoint(run_dir), first_pause_s=float(sys.argv[4]))
sys.exit(supervisor.run())
"""
COUNT = """
import os, sys, signal, time
from pathlib import Path
run_dir = Path(sys.argv[1])
tries = len(list(run_dir.glob("try-*"))) + 1
(run_dir / f"try-{tries}").touch()
def checkpoint(step): (run_dir / "checkpoints" / f"{step:06}").mkdir(parents=True)
"""


def start(run_dir: Path, script: str, *, retries: int = 2, pause_s: float = 0.01) -> subprocess.Popen[str]:
    words: Sequence[str] = (str(run_dir), str(retries), COUNT + script, str(pause_s))
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, *words], stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )


def tries(run_dir: Path) -> int:
    return len(list(run_dir.glob("try-*")))


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("status", [0, 2])
def test_a_finished_run_and_a_mistake_are_not_tried_again(tmp_path: Path, status: int) -> None:
    assert ended(start(tmp_path, f"sys.exit({status})")) == (status, "")
    assert tries(tmp_path) == 1


def test_a_failure_is_tried_again_until_it_works(tmp_path: Path) -> None:
    status, err = ended(start(tmp_path, "sys.exit(1 if tries < 3 else 0)"))
    assert (status, tries(tmp_path)) == (0, 3)
    assert "exit status 1; starting it again in 0 s (retry 1 of 2 before the next checkpoint)" in err


def test_after_its_retries_it_ends_with_the_last_exit_status(tmp_path: Path) -> None:
    status, err = ended(start(tmp_path, "sys.exit(10 + tries)"))
    assert (status, tries(tmp_path)) == (13, 3)
    assert "2 retries before the first checkpoint did not help" in err


def test_a_killed_trainer_is_started_again(tmp_path: Path) -> None:
    status, err = ended(start(tmp_path, "tries > 1 or os.kill(os.getpid(), signal.SIGKILL)"))
    assert (status, tries(tmp_path)) == (0, 2)
    assert "exit status 137" in err


def test_a_new_checkpoint_gives_all_retries_back(tmp_path: Path) -> None:
    status, _ = ended(start(tmp_path, "checkpoint(tries) if tries < 6 else None; sys.exit(1)", retries=1))
    assert (status, tries(tmp_path)) == (1, 6), "five tries with a checkpoint each, then one retry after the fifth"


def test_without_retries_the_status_passes_through(tmp_path: Path) -> None:
    assert ended(start(tmp_path, "sys.exit(1)", retries=0))[0] == 1
    assert tries(tmp_path) == 1


WAIT = """
def stop(number, frame): (run_dir / "stopped").touch(); sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
(run_dir / "waits").touch(); time.sleep(60)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_the_trainer_and_is_the_end(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, WAIT)
    wait_for(tmp_path / "waits")
    process.send_signal(number)
    assert ended(process) == (128 + number, "")
    assert (tmp_path / "stopped").exists()
    assert tries(tmp_path) == 1


def test_a_stop_signal_ends_the_pause_before_a_retry(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.exit(1)", pause_s=60)
    wait_for(tmp_path / "try-1")
    assert process.stderr is not None
    assert "starting it again" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert tries(tmp_path) == 1


def test_the_newest_checkpoint_is_the_highest_complete_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == -1
    for name in ("000002", "000010", ".staging-11", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 10
