"""A failure that cannot be retried reaches the trainer, which ends the run with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.models import make_tiny_model
from tandem_generator.__main__ import main
from tandem_protocol import end_file as end_file_module
from tandem_protocol.handover import Failure, generator_failure, generator_file, hand_over, handed_over
from tandem_protocol.memory import available_bytes, is_in_memory, limit_bytes, oom_kills, why_killed

FAILURE = Failure(2, "got x,\nexpected y")


def test_a_failure_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "failure"
    assert handed_over(file) is None
    hand_over(file, FAILURE)
    assert handed_over(file) == FAILURE
    assert [path.name for path in tmp_path.iterdir()] == ["failure"]


def test_the_failure_of_any_generator_is_found(tmp_path: Path) -> None:
    end = tmp_path / "run-over"
    assert generator_failure(end) is None
    hand_over(end.with_name("generator-failure.other-host"), FAILURE)
    assert generator_failure(end) == FAILURE


# -- the generator -----------------------------------------------------------------------------------------------------


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "run-over"
    monkeypatch.setenv("TANDEM_END_FILE", str(file))
    monkeypatch.setattr(end_file_module, "POLL_S", 0.01)
    return file


def serve(tmp_path: Path, *options: str) -> int:
    return main(["--model", str(make_tiny_model(tmp_path / "model")), "--engine", "mock", *options])


def test_a_generators_mistake_is_handed_over_and_it_ends_with_the_run(tmp_path: Path, end: Path) -> None:
    def trainer() -> None:
        while not generator_failure(end):
            pass
        end.touch()

    thread = threading.Thread(target=trainer)
    thread.start()
    status = serve(tmp_path, "--host", "0.0.0.0")
    thread.join()
    assert status == 0, "it must not be started again"
    failure = generator_failure(end)
    assert failure is not None
    assert failure.status == 2
    assert "no token is set" in failure.message


def test_a_generator_whose_trainer_does_not_end_the_run_ends_with_its_own_status(
    tmp_path: Path, end: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_file_module, "TRAINER_TIMEOUT_S", 0.02)
    assert serve(tmp_path, "--host", "0.0.0.0") == 2


def test_a_new_start_forgets_the_failure_of_the_last_one(tmp_path: Path, end: Path) -> None:
    hand_over(generator_file(end), FAILURE)
    end.touch()
    assert serve(tmp_path) == 0
    assert generator_failure(end) is None


def test_a_generator_does_not_start_after_a_failed_preflight_and_ends_with_the_run(
    tmp_path: Path, end: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over(tmp_path / "preflight", FAILURE)
    monkeypatch.setenv("TANDEM_PREFLIGHT_FILE", str(tmp_path / "preflight"))
    timer = threading.Timer(0.05, end.touch)
    timer.start()
    assert main(["--config", str(tmp_path / "absent.yaml")]) == 0
    assert end.exists(), "the trainer ends first: with --exit-code-from, the first end stops everything"


def test_a_generator_that_never_starts_ends_the_run_after_some_tries_and_one_that_has_served_does_not(
    tmp_path: Path, end: Path
) -> None:
    lease = tmp_path / "served/a.json"
    generator = end_file_module.EndFile(end)
    assert [generator.starts_fail(lease) for _ in range(3)] == [False, False, True]
    lease.parent.mkdir()
    lease.touch()
    assert not generator.starts_fail(lease)


def test_the_run_ends_with_the_status_of_a_generator_that_never_starts(
    tmp_path: Path, end: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the device has no memory left")

    monkeypatch.setattr("tandem_generator.__main__._check", fail)
    monkeypatch.setattr(end_file_module, "TRAINER_TIMEOUT_S", 0.02)
    assert [serve(tmp_path) for _ in range(3)] == [1, 1, 1]
    assert generator_failure(end) == Failure(1, "the device has no memory left")


# -- the trainer's supervisor ------------------------------------------------------------------------------------------

SUPERVISE = """
import os, sys
from pathlib import Path
from tandem_protocol.handover import generator_failure
from tandem_trainer import supervise
supervise.POLL_S = 0.02
end, script = Path(sys.argv[1]), sys.argv[2]
supervisor = supervise.Supervisor([sys.executable, "-c", script, str(end)], os.environ, retries=3,
    newest_checkpoint=lambda: -1, generator_failure=lambda: generator_failure(end), first_pause_s=0.01)
sys.exit(supervisor.run())
"""
FAIL = """
import sys, time
from pathlib import Path
from tandem_protocol.handover import Failure, hand_over
hand_over(Path(sys.argv[1]).with_name("generator-failure.a"), Failure(2, "vLLM refuses"))
"""


@pytest.mark.parametrize("then", ["time.sleep(60)", "sys.exit(1)"])
def test_a_generators_failure_stops_the_trainer_which_ends_with_its_status(tmp_path: Path, then: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SUPERVISE, str(tmp_path / "run-over"), FAIL + then],
        stderr=subprocess.PIPE, text=True, timeout=50, env=os.environ.copy(), check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr == "a generator cannot serve this run: vLLM refuses\n"


# -- the memory limit --------------------------------------------------------------------------------------------------


def cgroup(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_kills_and_the_limit_are_read_from_both_versions_of_cgroups(tmp_path: Path) -> None:
    two = cgroup(tmp_path / "2", memory_dot_events="low 0\noom 4\noom_kill 3\n", memory_dot_max="3221225472\n")
    one = cgroup(
        tmp_path / "1",
        memory__memory_dot_oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        memory__memory_dot_limit_in_bytes="3221225472\n",
    )
    for root in (one, two):
        assert (oom_kills(root), limit_bytes(root)) == (3, 3 << 30)
        message = why_killed("TANDEM_TRAINER_MEMORY", "lower x", root)
        assert "memory limit of 3.0 GiB. Fix: raise TANDEM_TRAINER_MEMORY, or lower x." in message


def test_the_available_memory_is_that_of_the_machine_or_the_rest_of_the_nearest_limit(tmp_path: Path) -> None:
    machine, own = tmp_path / "meminfo", tmp_path / "own"
    machine.write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    own.write_text("12:memory:/job/step\n0::/job/step\n")
    two: dict[str, str] = {
        "memory_dot_max": "3221225472\n",
        "memory_dot_current": "2147483648\n",
        "memory_dot_stat": "anon 1\ninactive_file 1073741800\nactive_file 24\n",
    }
    one = {
        "memory_dot_limit_in_bytes": "3221225472\n",
        "memory_dot_usage_in_bytes": "2147483648\n",
        "memory_dot_stat": "inactive_file 0\ntotal_inactive_file 1073741800\ntotal_active_file 24\n",
    }
    no_limit = {**two, "memory_dot_max": "max\n"}
    for version, files in {"": two, "memory__": one}.items():
        for group in ("", "job__", "job__step__"):  # as in a container, and as in a job of Slurm
            root = tmp_path / f"root-{version}{group}"
            cgroup(root, **{f"{version}{group}{name}": text for name, text in files.items()})
            if group and not version:
                cgroup(root, **no_limit)
            assert available_bytes(root, machine, own) == 2 << 30
    machine.write_text("MemAvailable: 1048576 kB\n")
    assert available_bytes(root, machine, own) == 1 << 30
    (root / "memory/job/step/memory.usage_in_bytes").write_text("9999999999\n")
    assert available_bytes(root, machine, own) == 0
    assert available_bytes(tmp_path / "none", machine, own) == 1 << 30, "no limit"
    assert available_bytes(tmp_path / "none", tmp_path / "missing", own) is None


def test_a_folder_is_in_memory_if_its_nearest_mount_is(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_bytes(
        f"/dev/vda / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\nstore:/w {tmp_path}/nfs nfs4 rw 0 0\n"
        f"tmpfs {tmp_path}/nfs/my\\040weights tmpfs rw 0 0\n"
        f"tmpfs {tmp_path}/over tmpfs rw 0 0\nstore:/w {tmp_path}/over nfs4 rw 0 0\n".encode()
        + b"tmpfs /not-\xff-utf8 tmpfs rw 0 0\n"
    )
    assert is_in_memory(tmp_path / "weights", mounts)
    assert is_in_memory(tmp_path / "nfs/my weights/versions", mounts)
    assert not is_in_memory(tmp_path / "nfs/weights", mounts)
    assert not is_in_memory(tmp_path / "over", mounts), "the last mount of a folder hides the others"
    assert not is_in_memory(Path("/weights"), mounts)
    assert not is_in_memory(tmp_path, tmp_path / "missing")


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n"])
def test_without_a_limit_there_is_none(tmp_path: Path, limit: str) -> None:
    name = "memory_dot_max" if limit == "max\n" else "memory__memory_dot_limit_in_bytes"
    assert limit_bytes(cgroup(tmp_path, **{name: limit})) is None
    assert oom_kills(tmp_path) == 0
