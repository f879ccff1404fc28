"""What `docker compose config` makes of the variables of compose.yaml. Nothing is started."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from support.stack import ROOT

pytestmark = pytest.mark.docker

OFFLINE = "TANDEM_ENVIRONMENT_OFFLINE"
TO_THE_HOST = "com.docker.network.bridge.inhibit_ipv4"


def configured(**variables: str) -> Any:
    """Return the configuration with these variables set, and the others of the file at their defaults."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "COMPOSE_"))}
    done = subprocess.run(
        ["docker", "compose", "-f", "compose.yaml", "--profile", "environment", "config", "--format", "json"],
        cwd=ROOT,
        env={**env, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def closed(config: Any) -> set[str]:
    """Return the networks of the environment from which nothing outside of them can be reached, not even the host."""
    networks = {name: config["networks"][name] for name in config["services"]["environment"]["networks"]}
    return {
        name
        for name, network in networks.items()
        if network.get("internal") and network["driver_opts"][TO_THE_HOST] == "true"
    }


@pytest.mark.parametrize("variables", [{}, {OFFLINE: "true"}, {OFFLINE: ""}], ids=str)
def test_the_environment_reaches_nothing_but_the_trainer(variables: dict[str, str]) -> None:
    config = configured(**variables)
    assert closed(config) == {"environment", "environment-outside"}
    assert [name for name, service in config["services"].items() if "environment" in service["networks"]] == [
        "environment",
        "trainer",
    ]


def test_the_environment_may_have_a_way_out_which_the_trainer_and_the_generators_do_not_get() -> None:
    closed_one, open_one = configured(), configured(**{OFFLINE: "false"})
    assert closed(open_one) == {"environment"}
    outside = open_one["networks"]["environment-outside"]
    assert not outside.get("internal")
    assert outside["driver_opts"] == {TO_THE_HOST: "false"}
    services = open_one["services"]
    assert [name for name, service in services.items() if "environment-outside" in service["networks"]] == [
        "environment"
    ]
    closed_one["networks"].pop("environment-outside")
    open_one["networks"].pop("environment-outside")
    assert open_one == closed_one, "nothing else changes"
