"""`make up WATCH=1 METRICS=1`: the pages beside the run. A fake `docker` answers here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from support.stack import ROOT

FAKE = """#!/bin/bash
echo "$*" >> {log}
case "$*" in
    *"up --detach --no-deps {broken}") echo "port is already allocated" >&2; exit 1 ;;
    *"ps --quiet watch") [ -z "$ADDRESS" ] || echo watched ;;
    "inspect --format "*" watched") echo 2026-11-26T12:00:00.5Z ;;
    *"logs --no-log-prefix --since 2026-11-26T12:00:00.5Z watch") printf '\\033[2K%s\\n' "$ADDRESS" ;;
    *"config --services") printf '%s\\n' watch generator prometheus trainer grafana ;;
    *"ps --all --format {{{{.State}}}} trainer") echo exited ;;
    *"ps --all --format {{{{.ExitCode}}}} trainer") echo 3 ;;
esac
"""
LINE = "Open http://127.0.0.1:8600/?token=secret"
JSON = f'{{"level": "info", "message": "{LINE}"}}'


def up(
    folder: Path, *, broken: str = "nothing", **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run scripts/up, and return also what it has called `docker compose` with."""
    log = folder / "log"
    for name, text in (("docker", FAKE.format(log=log, broken=broken)), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:/usr/bin:/bin", "COMPOSE_PROJECT_NAME": "mine", "ADDRESS": LINE, **variables}
    done = subprocess.run(
        [ROOT / "scripts/up", "--build"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    return done, [line.partition("compose ")[2] for line in log.read_text().splitlines()]


def started(calls: list[str]) -> list[str]:
    return [call.rpartition(" ")[2] for call in calls if "--no-deps" in call]


@pytest.mark.parametrize("variables", [{}, {"TANDEM_WATCH": "", "TANDEM_METRICS": "0"}], ids=str)
def test_without_the_variables_there_is_no_page(tmp_path: Path, variables: dict[str, str]) -> None:
    done, calls = up(tmp_path, **variables)
    assert done.returncode == 3
    assert started(calls) == []
    assert "watch" not in done.stdout


@pytest.mark.parametrize("line", [LINE, JSON])
def test_the_pages_are_started_and_announced_and_outlive_the_run(tmp_path: Path, line: str) -> None:
    done, calls = up(tmp_path, TANDEM_WATCH="1", TANDEM_METRICS="1", TANDEM_GRAFANA_PORT="3001", ADDRESS=line)
    assert done.returncode == 3, "the trainer's"
    assert started(calls) == ["watch", "prometheus", "grafana"]
    assert done.stdout.count("watch: http://127.0.0.1:8600/?token=secret\n") == 2, "at the start and at the end"
    assert "grafana: http://127.0.0.1:3001\n" in done.stdout
    assert "docker compose --project-name mine stop watch prometheus grafana\n" in done.stdout
    assert [call for call in calls if call.startswith("stop")] == ["stop generator trainer"]
    assert [call.rpartition("build ")[2] for call in calls if "build watch" in call] == ["watch"]


def test_a_page_that_does_not_start_does_not_stop_the_run(tmp_path: Path) -> None:
    done, calls = up(tmp_path, broken="watch", TANDEM_WATCH="1", TANDEM_METRICS="1")
    assert done.returncode == 3, done.stderr
    assert started(calls) == ["watch", "prometheus", "grafana"]
    assert "warning: watch does not start" in done.stderr
    assert "set TANDEM_WATCH_PORT to a free one" in done.stderr
    assert "--progress plain up --detach" in calls
    assert "--project-name mine stop prometheus grafana\n" in done.stdout
    assert "watch:" not in done.stdout


def test_a_page_that_has_ended_is_a_warning(tmp_path: Path) -> None:
    done, _ = up(tmp_path, TANDEM_WATCH="1", ADDRESS="")
    assert done.returncode == 3
    assert "Fix: read docker compose --project-name mine logs watch" in done.stderr


def test_every_service_of_tandem_gets_the_format_of_log_lines() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert [name for name, of in services.items() if "TANDEM_LOG" not in of.get("environment", {})] == [
        "prometheus",
        "grafana",
    ]


def test_make_passes_the_wish_for_pages_on(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/say_build").write_text("#!/bin/sh\n")
    (tmp_path / "scripts/up").write_text('#!/bin/sh\necho "got $TANDEM_WATCH and $TANDEM_METRICS"\n')
    for script in (tmp_path / "scripts").iterdir():
        script.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("TANDEM_WATCH", "TANDEM_METRICS")}
    command = ["make", "--file", str(ROOT / "Makefile"), "up", "WATCH=1"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert "got 1 and \n" in done.stdout
