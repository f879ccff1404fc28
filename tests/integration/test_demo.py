"""`tandem demo` with real processes, and with fakes of the two services (tests/support/fakes)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.demo import FAKES, fake_project, running_demo

FOREVER = "--trainer.max_steps=100000"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return fake_project(tmp_path)


def test_a_run_shows_every_step_and_ends_with_a_summary_and_a_picture(project: Path) -> None:
    with running_demo(project) as demo:
        output = demo.finish()
        assert demo.process.returncode == 0, demo.errors
        assert [line.split("  ")[:2] for line in output.splitlines() if line.startswith("step ")] == [
            ["step 1/3", "reward 0.100"],
            ["step 2/3", "reward 0.200"],
            ["step 3/3", "reward 0.300"],
        ]
        assert "eval after step 3: 0.750" in output
        summary = output[output.index("Summary") :].split()
        assert " ".join(summary).startswith("Summary steps 3 of 3 in 0 s reward 0.100 → 0.300 evaluation 0.250 → 0.750")
        assert (demo.run_dir / "reward.png").read_bytes().startswith(b"\x89PNG")
        demo.wait_until_nothing_is_left()


def test_prepare_runs_before_the_services_in_the_project_folder(project: Path) -> None:
    (project / "prepare.py").write_text("from pathlib import Path; Path('prepared').touch(); print('made it')")
    with running_demo(project) as demo:
        demo.finish()
        assert demo.process.returncode == 0
        assert (project / "prepared").exists()
        assert (demo.run_dir / "logs" / "prepare.log").read_text() == "made it\n"


def test_a_failed_preparation_ends_the_demo_and_shows_the_end_of_its_log(project: Path) -> None:
    (project / "prepare.py").write_text("raise SystemExit('no model here')")
    with running_demo(project) as demo:
        demo.finish()
        assert demo.process.returncode == 1
        assert "the preparation ended with exit code 1" in demo.errors
        assert "no model here" in demo.errors
        assert not (demo.run_dir / "logs" / "trainer.log").exists()


def test_services_get_disjoint_cpus_and_a_token_that_is_not_on_any_command_line(project: Path) -> None:
    with running_demo(project, FOREVER) as demo:
        demo.wait_for_line("step 1/")
        generator, trainer = demo.member("tandem_generator"), demo.member("tandem_trainer")
        token = generator.environ()["TANDEM_TOKEN"]
        assert trainer.environ()["TANDEM_TOKEN"] == token
        assert len(token) >= 32
        assert not any(token in word for process in demo.family() for word in process.cmdline())
        if len(os.sched_getaffinity(0)) > 1:
            assert not set(generator.cpu_affinity()) & set(trainer.cpu_affinity())
        for process in (generator, trainer):
            assert process.environ()["OMP_NUM_THREADS"] == str(len(process.cpu_affinity()))
            assert process.environ()["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_an_earlier_run_is_moved_and_kept(project: Path) -> None:
    for _ in range(2):
        with running_demo(project) as demo:
            output = demo.finish()
    assert "Renamed the earlier run to" in output
    assert len((project / "runs/default.1/metrics.jsonl").read_text().splitlines()) == 3
    assert len((project / "runs/default/metrics.jsonl").read_text().splitlines()) == 3


def test_resume_continues_in_the_same_folder(project: Path) -> None:
    for arguments in ((), ("--resume",)):
        with running_demo(project, *arguments) as demo:
            demo.finish()
    assert len((project / "runs/default/metrics.jsonl").read_text().splitlines()) == 6
    assert not (project / "runs/default.1").exists()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_trainer_write_a_checkpoint(project: Path, number: int, exit_code: int) -> None:
    with running_demo(project, FOREVER) as demo:
        demo.wait_for_line("step 2/")
        demo.process.send_signal(number)
        output = demo.finish()
        assert demo.process.returncode == exit_code
        assert int((demo.run_dir / "checkpoint").read_text()) >= 2
        assert "Summary" in output
        demo.wait_until_nothing_is_left()


def test_a_second_signal_kills_at_once(project: Path) -> None:
    with running_demo(project, FOREVER) as demo:
        demo.wait_for_line("step 1/")
        demo.member("tandem_trainer").suspend()  # so that it cannot finish its step
        demo.process.send_signal(signal.SIGINT)
        demo.wait_for_line("finishing the step")
        demo.process.send_signal(signal.SIGINT)
        demo.finish()
        assert demo.process.returncode == 130
        assert not (demo.run_dir / "checkpoint").exists()
        demo.wait_until_nothing_is_left()


@pytest.mark.parametrize(("trainer_code", "demo_code"), [(2, 2), (3, 1)])
def test_a_failed_trainer_ends_the_demo_and_shows_the_end_of_its_log(
    project: Path, trainer_code: int, demo_code: int
) -> None:
    with running_demo(project, FAKE_TRAINER_EXIT=str(trainer_code)) as demo:
        demo.finish()
        assert demo.process.returncode == demo_code
        log = demo.run_dir / "logs" / "trainer.log"
        assert f"the trainer ended with exit code {trainer_code}. Last lines of {log}" in demo.errors
        assert "the last words of the trainer" in demo.errors
        demo.wait_until_nothing_is_left()


def test_a_trainer_that_fails_while_it_stops_is_reported(project: Path) -> None:
    with running_demo(project, FOREVER, FAKE_TRAINER_EXIT="3") as demo:
        demo.wait_for_line("step 1/")
        demo.process.send_signal(signal.SIGINT)
        demo.finish()
        assert demo.process.returncode == 1
        assert "the trainer ended with exit code 3" in demo.errors


def test_a_second_demo_of_the_same_run_is_refused_and_the_first_continues(project: Path) -> None:
    with running_demo(project, FOREVER) as first:
        first.wait_for_line("step 1/")
        with running_demo(project) as second:
            second.finish()
            assert second.process.returncode == 2
            assert "is being written by another `tandem` command" in second.errors
        steps_before = len((first.run_dir / "metrics.jsonl").read_text().splitlines())
        first.wait_for_line(f"step {steps_before + 1}/")


def test_a_generator_that_is_not_ready_within_start_timeout_s_ends_the_demo(project: Path) -> None:
    with running_demo(project, "--trainer.start_timeout_s=1", FAKE_GENERATOR_READY="0") as demo:
        demo.finish()
        assert demo.process.returncode == 1
        assert "the generator was not ready within 1 s (trainer.start_timeout_s): a fake" in demo.errors
        demo.wait_until_nothing_is_left()


def test_the_weights_are_deleted_when_the_run_ends(project: Path) -> None:
    with running_demo(project, FOREVER) as demo:
        demo.wait_for_line("step 1/")
        weights = Path(demo.member("tandem_trainer").environ()["TANDEM__SHARED__WEIGHTS_DIR"])
        assert weights.is_dir()
        demo.process.send_signal(signal.SIGTERM)
        demo.finish()
        assert not weights.exists()


def test_check_runs_the_check_of_both_services_and_starts_neither(project: Path) -> None:
    command = [sys.executable, "-m", "tandem_cli", "demo", str(project), "--check"]
    env = {**os.environ, "PYTHONPATH": str(FAKES)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["checked generator", "checked trainer"])
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-folder",), "no-such-folder/config.yaml does not exist, expected a project"),
        (("{project}", "--trainer.max_steps", "many"), "trainer.max_steps: got 'many' (from command line)"),
        (("{project}", "--max-steps", "5"), "got the argument '--max-steps'; expected an option from --help"),
        (("{project}", "--trainer.run_name", ".."), "trainer.run_name: got '..'"),
    ],
)
def test_a_user_error_is_reported_without_a_traceback(project: Path, arguments: tuple[str, ...], message: str) -> None:
    words = [word.format(project=project) for word in arguments]
    command = [sys.executable, "-m", "tandem_cli", "demo", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
