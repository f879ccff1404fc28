"""An unmodified TRL script with the mock, for every interpreter in `TANDEM_TRL`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import trl
from support.generators import Generator, running
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

pytestmark = pytest.mark.trl
NEWEST = trl.PYTHONS[-1:]
SLOW_TOKENS = ["--generator.mock.faults.token_latency_s", "0.2"]


@pytest.fixture(scope="module")
def model(model: Path) -> Path:
    """The tiny model, readable for old versions of transformers too."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


def metrics(generator: Generator) -> str:
    return generator.client.get("/metrics").text


@pytest.mark.parametrize("python", trl.PYTHONS)
def test_the_weights_of_the_last_step_are_served(tmp_path: Path, model: Path, python: str):
    weights, out = tmp_path / "weights", tmp_path / "out"
    with running("mock", model, weights, log=tmp_path / "generator.log") as generator:
        status, output = trl.run(
            python, weights, "--model", str(model), "--out", str(out), "--port", str(generator.port)
        )
        assert status == 0, output
        assert generator.served.version == Version(3, 1)
    version, published = trl.newest(weights)
    saved = load_file(out / "model.safetensors")
    assert version == "3.1"
    assert published.keys() == saved.keys()
    assert all(torch.equal(published[name], saved[name]) for name in saved)
    start = load_file(model / "model.safetensors")
    assert any(not torch.equal(published[name], start[name]) for name in saved), "it has learned"


@pytest.mark.parametrize("python", NEWEST)
@pytest.mark.parametrize("arguments", [["--trainer", "rloo"], ["--trainer", "online_dpo"], ["--lora"]], ids=" ".join)
def test_other_trainers_and_adapters_publish_every_step(tmp_path: Path, model: Path, python: str, arguments: list[str]):
    weights, out = tmp_path / "weights", tmp_path / "out"
    with running("mock", model, weights, log=tmp_path / "generator.log") as generator:
        status, output = trl.run(
            python, weights, *arguments, "--model", str(model), "--out", str(out), "--port", str(generator.port)
        )
        assert status == 0, output
        log = generator.log.read_text()
    version, published = trl.newest(weights)
    assert version == "3.1"
    assert [f"serving version {step}.1," in log for step in range(4)] == [True] * 4
    start = load_file(model / "model.safetensors")
    assert published.keys() == start.keys(), "an adapter is merged"
    changed = {name for name in start if not torch.equal(published[name], start[name])}
    if arguments == ["--lora"]:
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    else:
        assert (out / "model.safetensors").exists()
        saved = load_file(out / "model.safetensors")
        assert all(torch.equal(published[name], saved[name]) for name in saved)


@pytest.mark.parametrize("python", NEWEST)
def test_a_generator_that_is_killed_in_a_request_is_waited_for(tmp_path: Path, model: Path, python: str):
    weights = tmp_path / "weights"
    killed = Generator("mock", model, weights, *SLOW_TOKENS, log=tmp_path / "killed.log").wait_ready()
    script = trl.start(
        python, weights, "--model", str(model), "--out", str(tmp_path / "out"), "--port", str(killed.port)
    )
    try:
        store = WeightStore(weights)
        deadline = time.monotonic() + 120
        while Version(1, 1) not in store.versions() or "tandem_requests_running 1.0" not in metrics(killed):
            assert script.poll() is None, trl.finish(script)
            assert time.monotonic() < deadline, "the second step never began"
            time.sleep(0.05)
    finally:
        killed.kill()
    with running("mock", model, weights, log=tmp_path / "generator.log", port=killed.port) as generator:
        status, output = trl.finish(script)
        assert status == 0, output
        served = [
            line.partition("serving version ")[2].split(",")[0] for line in generator.log.read_text().splitlines()
        ]
    assert trl.newest(weights)[0] == "3.1"
    assert [version for version in served if version] == ["1.1", "1.1", "2.1", "3.1"], (
        "it starts with the newest version"
    )


@pytest.mark.parametrize("python", NEWEST)
def test_two_ranks_share_the_generators_and_one_publishes(tmp_path: Path, model: Path, python: str):
    weights, out = tmp_path / "weights", tmp_path / "out"
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    with running("mock", model, weights, log=tmp_path / "generator.log") as generator:
        arguments = ["--model", str(model), "--out", str(out), "--port", str(generator.port)]
        status, output = trl.run(python, weights, *arguments, launcher=launcher)
        assert status == 0, output
    version, published = trl.newest(weights)
    assert version == "3.1"
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(published[name], saved[name]) for name in saved)


@pytest.mark.parametrize("python", NEWEST)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mode", "colocate"], "got vllm_mode='colocate', expected 'server'"),
        (["--trainer", "async"], "got AsyncGRPOTrainer, whose workers talk to vLLM themselves"),
    ],
    ids=["colocate", "async"],
)
def test_what_is_not_supported_is_refused_at_the_start(
    tmp_path: Path, model: Path, python: str, arguments: list[str], expected: str
):
    status, output = trl.run(
        python, tmp_path / "weights", *arguments, "--model", str(model), "--out", str(tmp_path / "out")
    )
    assert status == 2, output
    assert expected in output.splitlines()[-1]
    assert "Traceback" not in output
