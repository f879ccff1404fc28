"""The doctor's sources of facts: compose's merged configuration, nvidia-smi, a model's files, the hub."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException
from rich.console import Console

from support.gpus import NvidiaSmi
from support.models import make_tiny_model
from tandem_cli.doctor.command import show
from tandem_cli.doctor.compose import parse_size, parse_stack
from tandem_cli.doctor.docker_engine import connect
from tandem_cli.doctor.facts import ComposeService, Devices, Gpu, Model, Mount, Nvidia, Port, Process, Volume
from tandem_cli.doctor.finding import Finding
from tandem_cli.doctor.hub import ask_hub
from tandem_cli.doctor.model import parse_model, read_model
from tandem_cli.doctor.nvidia import read_nvidia
from tandem_cli.doctor.unknown import Refused, Unknown
from tandem_protocol.fingerprint import checkpoint_shapes

MERGED = {
    "name": "tandem",
    "services": {
        "generator": {
            "image": "tandem-generator:cuda",
            "build": {"context": "."},
            "shm_size": "8589934592",
            "environment": {"A": "1", "FROM_SHELL": None},
            "deploy": {
                "replicas": 2,
                "resources": {"reservations": {"devices": [{"driver": "nvidia", "device_ids": ["0", "1"]}]}},
            },
            "volumes": [{"type": "volume", "source": "weights", "target": "/weights", "read_only": True}],
            "ports": [{"target": 8000, "published": "8000", "host_ip": "127.0.0.1"}, {"target": 9000}],
        },
        "trainer": {
            "image": "elsewhere/trainer",
            "cpuset": "1",
            "user": "7:7",
            "gpus": [{"count": "all"}, {"driver": "cdi", "count": 2}, {"capabilities": ["gpu"]}],
            "devices": ["nvidia.com/gpu=3", {"source": "/dev/fuse", "target": "/dev/fuse"}],
        },
    },
    "volumes": {
        "runs": {"name": "tandem_runs"},
        "weights": {"name": "w", "driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": "size=1g,uid=10001"}},
    },
}

SMI = """<?xml version="1.0" ?>
<nvidia_smi_log>
  <driver_version>570.86.15</driver_version><cuda_version>12.8</cuda_version>
  <gpu id="00000000:01:00.0">
    <product_name>NVIDIA H100 80GB HBM3</product_name><uuid>GPU-1b</uuid>
    <fb_memory_usage><total>81559 MiB</total><used>3072 MiB</used></fb_memory_usage>
    <processes><process_info>
      <pid>4711</pid><type>C</type><process_name>python</process_name><used_memory>3072 MiB</used_memory>
    </process_info></processes>
  </gpu>
  <gpu id="00000000:02:00.0">
    <product_name>NVIDIA H100 80GB HBM3</product_name><uuid>GPU-2c</uuid>
    <fb_memory_usage><total>81559 MiB</total></fb_memory_usage><processes></processes>
  </gpu>
</nvidia_smi_log>"""


def test_the_merged_configuration_of_compose_is_parsed() -> None:
    stack = parse_stack(MERGED)
    generator, trainer = stack.services["generator"], stack.services["trainer"]
    assert generator.devices == (Devices("nvidia", ("0", "1")),)
    assert generator.mounts == (Mount("weights", "/weights", read_only=True),)
    assert generator.ports == (Port("127.0.0.1", 8000),)
    assert (generator.is_built, generator.replicas, generator.shm_bytes) == (True, 2, 8 << 30)
    assert generator.env == {"A": "1"}, "FROM_SHELL is not set there"
    assert trainer.devices == (
        Devices("nvidia", count=-1),
        Devices("cdi", count=2),
        Devices("nvidia", count=-1),
        Devices("cdi", ("nvidia.com/gpu=3",)),
    )
    assert (trainer.is_built, trainer.user, trainer.cpuset, trainer.shm_bytes) == (False, "7:7", "1", 64 << 20)
    assert stack.volumes == {"runs": Volume("tandem_runs"), "weights": Volume("w", {"size": "1g", "uid": "10001"})}


@pytest.mark.parametrize(
    ("text", "size"), [("1g", 1 << 30), ("1.5GB", 3 << 29), ("64m", 64 << 20), (4096, 4096), ("10kb", 10 << 10)]
)
def test_sizes_are_parsed_as_docker_writes_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "1x", "-1g"])
def test_a_text_that_is_not_a_size_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number"):
        parse_size(text)


@pytest.mark.parametrize(("cause", "fix"), [("Permission denied", "usermod"), ("No such file", "start Docker")])
def test_an_engine_that_does_not_answer_has_a_fix_for_its_cause(
    monkeypatch: pytest.MonkeyPatch, cause: str, fix: str
) -> None:
    def from_env(**_: object) -> None:
        raise DockerException(f"Error while fetching server API version: {cause}")

    monkeypatch.setattr(docker, "from_env", from_env)
    monkeypatch.setenv("DOCKER_HOST", "unix:///there")
    answer = connect()
    assert isinstance(answer, Unknown)
    assert fix in answer.fix
    assert "DOCKER_HOST=unix:///there" in answer.message


def test_nvidia_smi_gives_driver_gpus_and_their_processes(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi.says(SMI)
    busy = (Process(4711, "python", 3 << 30),)
    assert read_nvidia() == Nvidia(
        "570.86.15",
        (12, 8),
        (
            Gpu(0, "GPU-1b", 81559 << 20, busy),
            Gpu(1, "GPU-2c", 81559 << 20),
        ),
    )


@pytest.mark.parametrize("text", ["not XML", SMI.replace("<uuid>GPU-1b</uuid>", "")])
def test_garbled_output_of_nvidia_smi_is_unknown(nvidia_smi: NvidiaSmi, text: str) -> None:
    nvidia_smi.says(text)
    assert isinstance(read_nvidia(), Unknown)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_from_headers_and_estimated_from_config_json_alone(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(tmp_path, tied=tied)
    model = read_model(folder)
    assert isinstance(model, Model)
    shapes = checkpoint_shapes(folder)
    embedding = 64 * 32
    layers = 2 * (32 * 32 * 2 * (2 + 1) + 3 * 32 * 64)
    norms = 5 * 32
    assert model.parameters == layers + norms + embedding * (1 if tied else 2)
    assert (model.layers, model.hidden, model.kv_heads, model.head_dim, model.vocab) == (2, 32, 1, 32, 64)
    estimate = parse_model(json.loads((folder / "config.json").read_text()), None, "")
    assert estimate.parameters == model.parameters - norms
    assert len(shapes) > 1


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    found = read_model(tmp_path)
    assert isinstance(found, Refused)
    assert "num_hidden_layers" in found.message


class Hub(BaseHTTPRequestHandler):
    """A model hub with the model `org/open`, and `org/gated` for requests with the right token."""

    def do_GET(self) -> None:
        name = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        allowed = name == "org/open" or self.headers["Authorization"] == "Bearer good"
        known = name in ("org/open", "org/gated")
        status = 200 if allowed else 401
        self.send_response(status if known else 404)
        self.end_headers()
        sizes = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16}
        body = {"safetensors": {"total": 1234}} if self.path.startswith("/api") else sizes
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_hub_gives_a_models_size_if_the_preflights_token_allows_it(tmp_path: Path) -> None:
    def ask(name: str, token: str = "") -> Model | Unknown:
        (tmp_path / "token").write_text(f"{token}\n")
        mount = Mount(str(tmp_path / "token"), "/hf_token", read_only=True)
        return ask_hub(name, None, ComposeService("tandem-trainer:cpu", env={"HF_ENDPOINT": url}, mounts=(mount,)))

    with hub() as url:
        model = ask("org/open")
        assert isinstance(model, Model)
        assert (model.parameters, model.is_local) == (1234, False)
        assert isinstance(ask("org/gated", "good"), Model)
        for token, words in (("", "has no token"), ("bad", "refuses the preflight's token")):
            refused = ask("org/gated", token)
            assert isinstance(refused, Refused)
            assert words in refused.message
        assert isinstance(ask("org/none"), Refused)
    unreachable = ask("org/open")
    assert isinstance(unreachable, Unknown)
    assert not isinstance(unreachable, Refused)


def test_a_finding_is_printed_on_one_line_with_its_fix_below() -> None:
    output = io.StringIO()
    show([Finding("a", "ok", "fine"), Finding("bcd", "fail", "broken [x]", "run [y]")], Console(file=output))
    assert output.getvalue() == "ok    a    fine\nFAIL  bcd  broken [x]\n           Fix: run [y]\n"
