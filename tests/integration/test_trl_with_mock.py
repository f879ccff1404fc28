"""An unmodified TRL script with the mock, in the environments of `make trl`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import trl
from support.generators import Generator, running
from support.json_logs import records
from support.ports import free_port
from support.served import wait_until
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

pytestmark = [pytest.mark.trl, pytest.mark.slow]
SLOW_TOKENS = ["--generator.mock.faults.token_latency_s", "0.1"]
LAUNCH = ["-m", "accelerate.commands.launch"]
ONE_RANK = [*LAUNCH, "-m"]
"""`accelerate launch -m`, as the documentation shows it."""
TWO_RANKS = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"]
"""`--multi_gpu` also starts several ranks on CPUs. `--cpu` would start one."""


@pytest.fixture(scope="module")
def model(model: Path) -> Path:
    """The tiny model, readable for old versions of transformers too."""
    return trl.make_readable(model)


def arguments(tmp_path: Path, model: Path, generator: Generator, *further: str) -> list[str]:
    return ["--model", str(model), "--out", str(tmp_path / "out"), "--port", str(generator.port), *further]


def assert_published(folder: Path, version: str, saved: Path) -> None:
    """The newest version in the store is `version`, and has the weights of the model that TRL has saved."""
    newest, published = trl.newest(folder)
    weights = load_file(saved / "model.safetensors")
    assert newest == version
    assert published.keys() == weights.keys()
    assert all(torch.equal(published[name], weights[name]) for name in weights)


@pytest.mark.parametrize("python", trl.EACH_VERSION)
def test_each_supported_version_learns_and_its_last_step_is_served(tmp_path: Path, model: Path, python: Path):
    weights = tmp_path / "weights"
    with running("mock", model, weights, log=tmp_path / "generator.log") as generator:
        status, output = trl.run(python, weights, *arguments(tmp_path, model, generator))
        assert status == 0, output
        assert generator.served.version == Version(3, 1)
    assert_published(weights, "3.1", tmp_path / "out/grpo")
    start, end = load_file(model / "model.safetensors"), trl.newest(weights)[1]
    assert any(not torch.equal(start[name], end[name]) for name in start), "it has learned"


def test_the_trainers_of_one_script_publish_every_step_each_with_an_attempt_of_its_own(tmp_path: Path, model: Path):
    weights = tmp_path / "weights"
    with running("mock", model, weights, log=tmp_path / "generator.log") as generator:
        given = arguments(tmp_path, model, generator, "--trainers", "rloo", "online_dpo", "lora")
        variables = {"TANDEM__TRAINER__PUBLISH__KEEP": "99", "TANDEM_LOG": "json"}
        status, output = trl.run(trl.NEWEST, weights, *given, environment=variables)
        assert status == 0, output
    records(output)  # a line that is not one fails the test
    store = WeightStore(weights)
    assert store.versions() == [Version(step, attempt) for attempt in (1, 2, 3) for step in range(4)]
    for attempt, trainer in enumerate(("rloo", "online_dpo"), start=1):
        published = trl.tensors(store, Version(3, attempt))
        saved = load_file(tmp_path / "out" / trainer / "model.safetensors")
        assert all(torch.equal(published[name], saved[name]) for name in saved), trainer
    start, merged = load_file(model / "model.safetensors"), trl.tensors(store, Version(3, 3))
    assert merged.keys() == start.keys(), "an adapter is merged"
    changed = {name.split(".")[-2] for name in start if not torch.equal(merged[name], start[name])}
    assert changed == {"q_proj", "v_proj"}


def test_a_killed_generator_is_waited_for_and_every_step_has_completions_of_its_own_version(
    tmp_path: Path, model: Path
):
    weights, log = tmp_path / "weights", tmp_path / "generator.log"
    with ExitStack() as stack:
        start = partial(running, "mock", model, weights, log=log, port=free_port())
        first = stack.enter_context(start(*SLOW_TOKENS))
        given = arguments(tmp_path, model, first, "--wait-for-death", "2")
        script, spans = trl.start_recorded(trl.NEWEST, weights, tmp_path / "spans.jsonl", *given)
        stack.enter_context(trl.ended(script))
        wait_until(lambda: first.served.version == Version(1, 1) and first.is_sampling, timeout_s=120)
        first.kill()  # in the middle of a step
        second = stack.enter_context(start())
        wait_until(lambda: second.served.version == Version(2, 1) and spans()[-1]["step"] == 2, timeout_s=60)
        second.kill()  # between two steps
        third = stack.enter_context(start())
        status, output = trl.finish(script)
        assert status == 0, output
        assert third.served.version == Version(3, 1)
    assert [(line["step"], line["versions"]) for line in spans()] == [(step, [f"{step}.1"]) for step in range(3)]
    assert_published(weights, "3.1", tmp_path / "out/grpo")


def test_two_ranks_share_the_generators_one_publishes_and_no_process_is_left(tmp_path: Path, model: Path):
    weights = tmp_path / "weights"
    with running("mock", model, weights, log=tmp_path / "generator.log") as generator:
        given = arguments(tmp_path, model, generator)
        script, spans = trl.start_recorded(trl.NEWEST, weights, tmp_path / "spans.jsonl", *given, launcher=TWO_RANKS)
        status, output = trl.finish(script)
        assert status == 0, output
    assert [line["completions"] for line in spans()] == [8] * 3, "one request is for the completions of both ranks"
    assert_published(weights, "3.1", tmp_path / "out/grpo")


def test_several_generators_share_the_completions_and_all_serve_the_last_step(tmp_path: Path, model: Path):
    weights = tmp_path / "weights"
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(running("mock", model, weights, log=tmp_path / f"{name}.log")) for name in ("a", "b")
        ]
        urls = json.dumps([f"http://127.0.0.1:{replica.port}" for replica in replicas])
        given = arguments(tmp_path, model, replicas[0])
        variables = {"TANDEM__SHARED__GENERATORS": urls}
        status, output = trl.run(trl.NEWEST, weights, *given, environment=variables, launcher=ONE_RANK)
        assert status == 0, output
        assert [replica.served.version for replica in replicas] == [Version(3, 1)] * 2
        shares = [replica.client.get("/metrics").text for replica in replicas]
        completions = [
            float(line.split()[1])
            for text in shares
            for line in text.splitlines()
            if line.startswith("tandem_rollout_completions_total ")
        ]
        assert sum(completions) == 3 * 4
        assert min(completions) >= 4, "one prompt per step; the next step asks the next generator"


def test_what_is_not_supported_is_refused_at_the_start(tmp_path: Path, model: Path):
    given = ["--model", str(model), "--out", str(tmp_path / "out")]
    refused = {
        "got vllm_mode='colocate', expected 'server'": ["--mode", "colocate"],
        "got AsyncGRPOTrainer, whose workers talk to vLLM themselves": ["--trainers", "async"],
    }
    scripts = {why: trl.start(trl.NEWEST, tmp_path / "weights", *given, *words) for why, words in refused.items()}
    for why, script in scripts.items():
        status, output = trl.finish(script)
        assert status == 2, output
        assert why in output.splitlines()[-1]
        assert "Traceback" not in output
