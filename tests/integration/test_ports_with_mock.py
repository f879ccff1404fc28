"""A trainer on one machine opens no port that another machine can reach."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from support.generators import TOKEN
from support.projects import Project


@pytest.mark.parametrize(("ranks", "ports"), [(1, 0), (2, 3)], ids=["one process", "two processes"])
def test_the_trainer_listens_on_loopback_only(make_project: Callable[..., Project], ranks: int, ports: int):
    project = make_project(max_steps=2)
    trainer = subprocess.Popen(
        [sys.executable, "-m", "tandem_trainer.launch", "--config", str(project.directory / "config.yaml")],
        env={**os.environ, "TANDEM_TOKEN": TOKEN, "TANDEM_TRAINER_PROCESSES": str(ranks)},
        stdout=subprocess.DEVNULL,
    )
    listening = set()
    while trainer.poll() is None:
        with suppress(psutil.Error):  # one of them has just ended
            root = psutil.Process(trainer.pid)
            for process in (root, *root.children(recursive=True)):
                listening |= {c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        time.sleep(0.02)
    assert trainer.returncode == 0
    assert len(listening) == ports, "the launcher's, and one of each rank"
    assert {address.ip for address in listening} <= {"127.0.0.1"}
