"""Mistakes and full disks in the real stack: the message is where the user looks, and the status says which it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.stack import Stack, set_steps, stack

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("mock_images")]

FILL = """
import contextlib, pathlib
with contextlib.suppress(OSError), pathlib.Path("/runs/filler").open("wb", buffering=0) as file:
    while file.write(bytes(4096)):
        pass
"""
LOG_TIMEOUT_S = 60.0


def change(project: Path, section: str, **keys: Any) -> None:
    config = yaml.safe_load((project / "config.yaml").read_text())
    config.setdefault(section, {}).update(keys)
    (project / "config.yaml").write_text(yaml.safe_dump(config))


@contextmanager
def changed_stack(project: Path, override: dict[str, Any], **options: Any) -> Iterator[Stack]:
    """A stack with a further Compose file."""
    file = project / "compose.override.yaml"
    file.write_text(yaml.safe_dump(override))
    with stack(project, **options) as made:
        made.files = ("compose.yaml", str(file))
        yield made


def exit_codes(made: Stack) -> dict[str, int]:
    return {name: made.container(name).attrs["State"]["ExitCode"] for name in ("trainer", "generator")}


@pytest.mark.parametrize("options", [(), ("--exit-code-from", "trainer")])
def test_a_mistake_that_the_preflight_finds_is_shown_and_is_the_trainers_status(
    project: Path, options: tuple[str, ...]
) -> None:
    change(project, "generator", mox=1)
    with stack(project) as made:
        up = made.compose("up", "--no-build", *options, timeout_s=120)
        assert "unknown configuration key 'generator.mox'" in up.stdout
        assert up.returncode == (2 if options else 0)
        assert exit_codes(made)["trainer"] == 2


def test_prepares_failure_is_shown_with_its_output_and_its_status(project: Path) -> None:
    (project / "prepare.py").write_text("print('the data set is gone')\nraise SystemExit(7)\n")
    with stack(project, variables={"TANDEM_LOG": "json"}) as made:
        up = made.compose("up", "--no-build", "--exit-code-from", "trainer", timeout_s=120)
        assert up.returncode == 7
        (line,) = [json.loads(line) for line in made.logs().splitlines()]
    assert line["level"] == "error"
    assert "prepare.py ended with exit status 7" in line["message"]
    assert "the data set is gone" in line["message"]


def test_a_generators_mistake_ends_the_run_and_nothing_is_started_again(project: Path) -> None:
    # only in the generator's environment, so that the preflight does not see it
    wrong = {"services": {"generator": {"environment": {"TANDEM_TOKEN_FILE": "/absent"}}}}
    with changed_stack(project, wrong) as made:
        up = made.compose("up", "--no-build", "--exit-code-from", "trainer", timeout_s=120)
        assert up.returncode == 2
        assert "a generator cannot serve this run: " in made.logs()
        assert "/absent" in made.logs()
        assert made.container("generator").attrs["RestartCount"] == 0


def wait_for_log(made: Stack, text: str) -> None:
    deadline = time.monotonic() + LOG_TIMEOUT_S
    while text not in made.logs():
        assert time.monotonic() < deadline, made.logs()
        time.sleep(0.5)


def keep_mounted(made: Stack, volume: str) -> None:
    """Use a volume in another container of the stack: one in memory is empty once nobody uses it."""
    labels = {"com.docker.compose.project": made.name, "com.docker.compose.service": "holder"}
    made.engine.containers.run(
        made.container("trainer").image, ["300"], entrypoint="sleep", detach=True, name=f"{made.name}-holder",
        labels=labels, volumes={f"{made.name}_{volume}": {"bind": "/held"}}, network_mode="none",
    )  # fmt: skip


def small_runs(size: str, **options: str) -> dict[str, Any]:
    o = ",".join([f"size={size}", *(f"{name}={value}" for name, value in options.items())])
    return {"volumes": {"runs": {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": o}}}}


def test_a_full_runs_volume_is_an_alert_and_the_run_goes_on_when_there_is_space(project: Path) -> None:
    set_steps(project, 60)
    change(project, "generator", mock={"faults": {"latency_s": 0.2}})
    change(project, "trainer", eval={"prompts": {"source": "prompts.jsonl"}, "every_steps": 10})
    with changed_stack(project, small_runs("8m", uid="10001", gid="10001")) as made:
        made.start()
        keep_mounted(made, "runs")
        wait_for_log(made, "step 3/60")
        made.python("trainer", FILL)
        wait_for_log(made, "The run tries again at the next step")
        made.must("exec", "-T", "trainer", "rm", "/runs/filler")
        assert made.wait(timeout_s=180) == 0
        log = made.logs()
        runs = made.copy_runs(project / "runs") / "default"
        made.engine.containers.get(f"{made.name}-holder").remove(force=True)
    rows = {
        name: [json.loads(line)["step"] for line in (runs / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "eval", "rollouts")
    }
    assert rows["metrics"] == [*range(1, 61)]
    assert rows["eval"] == [*range(0, 61, 10)]
    assert {*rows["rollouts"]} == {*range(1, 61)}
    assert "starting it again" not in log
    assert "Traceback" not in log


def test_a_runs_volume_of_another_user_is_one_message_with_the_fix(project: Path) -> None:
    with changed_stack(project, small_runs("8m", uid="0", gid="0", mode="0755")) as made:
        up = made.compose("up", "--no-build", "--exit-code-from", "trainer", timeout_s=120)
        assert up.returncode == 2
        (line,) = made.logs().splitlines()
    assert "Permission denied, as user 10001. Fix: run `chown -R 10001:10001`" in line


def test_a_weights_volume_that_is_too_small_is_reported_with_the_command(project: Path) -> None:
    with stack(project, variables={"TANDEM_WEIGHTS_SIZE": "64k"}) as made:
        up = made.compose("up", "--no-build", "--exit-code-from", "trainer", timeout_s=120)
        assert up.returncode == 2
        assert f"docker compose down && docker volume rm {made.name}_weights" in made.logs()


def test_a_trainer_that_needs_more_memory_than_it_may_have_names_the_variable(project: Path) -> None:
    (project / "odd_rewards.py").write_text("def odd(completion_ids, **_):\n    return [len(b'x' * (8 << 30))]\n")
    variables = {"TANDEM_TRAINER_MEMORY": "1g", "TANDEM_TRAINER_RETRIES": "0"}
    with stack(project, variables=variables) as made:
        made.compose("up", "--no-build", timeout_s=120)
        assert made.container("trainer").attrs["State"]["ExitCode"] == 137
        assert "memory limit of 1.0 GiB. Fix: raise TANDEM_TRAINER_MEMORY" in made.logs()
