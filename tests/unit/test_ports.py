"""A port that cannot be opened is reported with its key, the process that holds it, and the fix."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tandem_generator.__main__ import main
from tandem_protocol import ports
from tandem_protocol.config import ConfigError
from tandem_protocol.processes import USER_ERROR
from tandem_rollout.errors import UserError
from tandem_trainer.run.exporter import exported


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_port_in_use_is_reported_with_its_key_and_process(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            ports.listen(host, port, "generator.port")
    message = str(caught.value)
    assert f"generator.port {port} on {host} cannot be listened on: it is in use by process {os.getpid()} (" in message
    assert message.endswith("Fix: stop that process, or choose another generator.port.")


def test_a_process_that_cannot_be_seen_is_left_out_of_the_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ports, "_PROC", tmp_path)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match=r"it is in use[.] Fix: stop that process"),
    ):
        ports.listen("127.0.0.1", taken.getsockname()[1], "generator.port")


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "2001:db8::1"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=f"generator.port 0 on {host} cannot be listened on: .*Fix: use an address"):
        ports.listen(host, 0, "generator.port")


def test_listen_returns_a_listening_socket() -> None:
    with ports.listen("127.0.0.1", 0, "generator.port") as free:
        assert free.getsockname()[1] > 0


def test_the_mock_generator_reports_a_port_in_use_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--engine", "mock", "--model", "m", "--port", str(taken.getsockname()[1])]
        assert main(words) == USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert " ERROR    generator.port " in line
    assert f"process {os.getpid()} " in line


def test_a_trainer_metrics_port_in_use_is_reported(tmp_path: Path) -> None:
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(UserError, match=r"^trainer\.metrics_port \d+ cannot be listened on: it is in use by process "),
        exported(tmp_path, taken.getsockname()[1], "secret"),
    ):
        pass
