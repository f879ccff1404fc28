"""Every query of the dashboard has data when a real Prometheus scrapes a real run, as compose.yaml configures it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.generators import TOKEN
from support.helm import CHART, ROOT, one, render
from support.models import make_tiny_model
from support.ports import free_port
from support.projects import Project, make_projects

pytestmark = [pytest.mark.helm, pytest.mark.prometheus]

METRICS = ROOT / "docker/metrics"
TIMEOUT_S = 120.0
FAULTS = ("--generator.mock.faults.load_failures", "1")
"""The first switch fails and is retried, so that failed switches are counted."""


def queries() -> dict[str, str]:
    """Return the dashboard's expressions by panel and legend."""
    text = one(render({"monitoring": {"dashboard": {"enabled": True}}}), "ConfigMap", "-dashboard")["data"][
        "tandem.json"
    ]
    panels = yaml.safe_load(text)["panels"]
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"].replace("$namespace", "compose")
        for panel in panels
        for target in panel["targets"]
    }


@contextmanager
def started(*command: str, log: Path, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process until the end of the block."""
    env = {**os.environ, "TANDEM_TOKEN": TOKEN}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)


def scraping(ports: dict[str, int]) -> dict[str, Any]:
    """Return the configuration of compose.yaml's Prometheus, with addresses of this machine and other intervals."""
    config: dict[str, Any] = yaml.safe_load((METRICS / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    assert {name for names in job.pop("dns_sd_configs") for name in names["names"]} == set(ports)
    job["static_configs"] = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"__meta_dns_name": name}} for name, port in ports.items()
    ]
    job["authorization"] = {"credentials": TOKEN}
    intervals = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    return {**config, "global": intervals, "rule_files": [str(METRICS / name) for name in config["rule_files"]]}


def result(url: str, expression: str) -> list[Any]:
    """Return the result of a query, which is empty while Prometheus starts."""
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10)
    except httpx.TransportError:
        return []
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return []
    assert answer.status_code == httpx.codes.OK, answer.text
    return list(answer.json()["data"]["result"])


@contextmanager
def scraped_run(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Train while Prometheus scrapes trainer and generator. Yield Prometheus' address and the trainer's process."""
    metrics_port, port = free_port(), free_port()
    with make_projects(folder, make_tiny_model(folder / "model")) as make:
        project: Project = make(faults=FAULTS, max_steps=1_000_000, metrics_port=metrics_port)
        (generator,) = yaml.safe_load((project.directory / "config.yaml").read_text())["shared"]["generators"]
        ports = {"trainer": metrics_port, "generator": int(generator.rpartition(":")[2])}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(scraping(ports)))
        trainer = (sys.executable, "-m", "tandem_trainer", "--config", "config.yaml")
        flags = ("--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.path=data")
        with (
            started(*trainer, log=folder / "trainer.log", cwd=project.directory) as training,
            started("prometheus", *flags, log=folder / "prometheus.log", cwd=folder),
        ):
            yield f"http://127.0.0.1:{port}", training


def test_every_query_of_the_dashboard_has_data_of_a_real_run(tmp_path: Path) -> None:
    with scraped_run(tmp_path) as (url, training):
        empty = queries()
        deadline = time.monotonic() + TIMEOUT_S
        while empty:
            assert training.poll() is None, (tmp_path / "trainer.log").read_text()
            assert time.monotonic() < deadline, f"no data for {empty}: {(tmp_path / 'prometheus.log').read_text()}"
            empty = {name: expression for name, expression in empty.items() if not result(url, expression)}
            time.sleep(0.5)
        pods = {sample["metric"]["pod"] for sample in result(url, "tandem_trainer_step or tandem_ready")}
        assert pods == {"tandem-trainer-127.0.0.1", "tandem-generator-127.0.0.1"}
        groups = httpx.get(f"{url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
        assert set(health.values()) == {"ok"}, health


def test_the_dashboard_has_a_query_for_each_panel() -> None:
    assert len(queries()) >= len(yaml.safe_load((CHART / "files/dashboard.json").read_text())["panels"])
