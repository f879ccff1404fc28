"""The service `tandem` of compose.yaml, which has Docker's socket."""

from __future__ import annotations

import re

import yaml

from support.stack import ROOT

FILES = ("compose.yaml", "compose.gpu.yaml")
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_only_the_service_that_is_started_by_name_gets_the_socket_of_docker() -> None:
    with_socket = [name for name, service in SERVICES.items() if "docker.sock" in str(service)]
    assert with_socket == ["tandem"]
    assert SERVICES["tandem"]["profiles"] == ["tools"]
    assert "depends_on" not in SERVICES["tandem"]


def test_the_service_gets_every_variable_that_the_compose_files_read() -> None:
    read = {name for file in FILES for name in re.findall(r"\$\{(\w+)", (ROOT / file).read_text())}
    assert read - {"PWD"} <= SERVICES["tandem"]["environment"].keys()
