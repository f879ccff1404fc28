"""Tests in two processes: what shares a resource of the machine runs in one of them, and slow tests start first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PODS = ("tests/deployment/test_pods_nodes.py", "tests/deployment/test_pods_prepare.py")
QUICK, SLOW = "tests/deployment/test_compose_replicas.py", "tests/deployment/test_compose_digits.py"


def test_a_group_of_tests_runs_in_one_process_and_slow_groups_start_first() -> None:
    """All tests are skipped, because no engine answers. A skipped test also has a process and a place in the order."""
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup"]
    done = subprocess.run(
        [*words, "--no-loadscope-reorder", *PODS, QUICK, SLOW],
        cwd=ROOT,
        env={**os.environ, "DOCKER_HOST": "unix:///no-engine", "TANDEM_REQUIRE": "", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    ran = re.findall(r"^\[(gw\d)\] .* SKIPPED (\S+?)::", done.stdout, re.MULTILINE)
    assert {file for _, file in ran} == {*PODS, QUICK, SLOW}, done.stdout + done.stderr
    for group in (PODS, (QUICK,)):
        assert len({process for process, file in ran if file in group}) == 1, f"{group} share a process: {ran}"
    files = [file for _, file in ran]
    assert files.index(SLOW) < files.index(QUICK)
