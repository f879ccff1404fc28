"""A run whose disk is full for a while, and one whose generator makes a mistake, as real processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from support.projects import Project
from tandem_protocol.handover import Failure, hand_over
from tandem_protocol.lock import exclusive

TIMEOUT_S = 60.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tandem-test", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the permission to mount a small file system")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def test_a_run_whose_disk_is_full_for_a_while_is_the_same_run(
    make_project: Callable[..., Project], small_disk: Path
) -> None:
    options = {"max_steps": 14, "eval": {"prompts": {"source": "prompts.jsonl"}, "every_steps": 2}}
    undisturbed = make_project("undisturbed", **options)
    assert undisturbed.train().returncode == 0
    project = make_project("full", **options, output_dir=str(small_disk))
    metrics = small_disk / "default/metrics.jsonl"

    def published() -> int:
        return int(project.generator.served.version.step)

    def disturb() -> None:
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
        filler = fill(small_disk)
        later = min(published() + 3, 14)  # a checkpoint is due within two steps
        wait_until(lambda: published() >= later)
        filler.unlink()

    thread = threading.Thread(target=disturb)
    thread.start()
    ended = project.train()
    thread.join()
    assert ended.returncode == 0, ended.stderr
    print(ended.stderr)
    assert "It needs about" in ended.stderr
    assert "Traceback" not in ended.stderr
    runs = project.directory / "runs"
    runs.symlink_to(small_disk)
    ours, theirs = project.parameters(14), undisturbed.parameters(14)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl"):
        assert [line["step"] for line in project.lines(name)] == [line["step"] for line in undisturbed.lines(name)]
    assert "checkpoint_failed" in {json.loads(line)["kind"] for line in (runs / "default/events.jsonl").open()}


def test_a_generators_mistake_ends_the_run_with_a_checkpoint_and_its_status(
    make_project: Callable[..., Project], tmp_path: Path
) -> None:
    project = make_project(max_steps=100_000)
    end_file = tmp_path / "run-over"

    def fail() -> None:
        wait_until(lambda: any((project.run_dir / "checkpoints").glob("0*")))
        hand_over(tmp_path / "generator-failure.other", Failure(2, "vLLM refuses an option"))

    thread = threading.Thread(target=fail)
    thread.start()
    ended = project.train(TANDEM_TRAINER_END_FILE=str(end_file), TANDEM_TRAINER_RETRIES="3")
    thread.join()
    assert ended.returncode == 2
    assert ended.stderr.count(" ERROR ") == 1
    assert "ERROR    a generator cannot serve this run: vLLM refuses an option" in ended.stderr
    assert "stopped at step" in ended.stdout, "with a checkpoint"
    assert end_file.exists()


def test_a_failed_preflight_is_the_trainers_message_and_status(
    make_project: Callable[..., Project], tmp_path: Path
) -> None:
    project = make_project()
    hand_over(tmp_path / "failure", Failure(7, "prepare.py ended with exit status 7."))
    end_file = tmp_path / "run-over"
    preflight = str(tmp_path / "failure")
    ended = project.train(TANDEM_TRAINER_END_FILE=str(end_file), TANDEM_PREFLIGHT_FILE=preflight)
    assert ended.returncode == 7
    assert ended.stderr.endswith(" ERROR    prepare.py ended with exit status 7.\n")
    assert end_file.exists()


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(("--trainer.max_stepss=5",), {}), ((), {"TANDEM_TRAINER_PROCESSES": "x"}), ((), {"TANDEM_LOG": "xml"})],
)
def test_a_mistake_in_what_the_supervisor_reads_ends_the_run(
    make_project: Callable[..., Project], tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, Any]
) -> None:
    end_file = tmp_path / "run-over"
    project = make_project()
    command = project.train(*arguments, TANDEM_TRAINER_END_FILE=str(end_file), **variables)
    assert command.returncode == 2
    assert end_file.exists()


def test_a_second_supervisor_ends_nothing(make_project: Callable[..., Project], tmp_path: Path) -> None:
    end_file = tmp_path / "run-over"
    with exclusive(tmp_path / "SUPERVISOR", "the first one"):
        ended = make_project().train("--trainer.max_stepss=5", TANDEM_TRAINER_END_FILE=str(end_file))
    assert ended.returncode == 2
    assert "the first one is at work" in ended.stderr
    assert not end_file.exists()
