"""Start and end of a generator: it loads the store's version, stops cleanly, and exits if its policy is torn."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from support.generators import Generator, running
from support.models import make_tiny_model
from support.reference_policy import ReferencePolicy
from support.served import wait_until
from tandem_protocol.messages import Completion, Prompt, RolloutLine, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

V41, V42, V43 = Version(41, 1), Version(42, 1), Version(43, 1)
STOP_S = 60.0
PATIENT = ["--visible-timeout-s", "600", "--shutdown-timeout-s", "600"]
"""Timeouts far above STOP_S, so that no timeout ends the process during a test."""
FAULT = "--generator.mock.faults."
PROMPT = {"token_ids": [5, 9, 13]}


@pytest.fixture
def policy(tmp_path: Path) -> ReferencePolicy:
    model = make_tiny_model(tmp_path / "model", initializer_range=0.3, max_position_embeddings=2048)
    return ReferencePolicy(model, WeightStore(tmp_path / "weights"))


@contextmanager
def generator_of(
    policy: ReferencePolicy, *arguments: str, engine: str = "mock", forks: bool = False
) -> Iterator[Generator]:
    weights, log = policy.store.root, policy.store.root.parent / "log"
    with running(engine, policy.model_dir, weights, *arguments, log=log, forks=forks) as generator:
        yield generator


def sampled(generator: Generator) -> Completion:
    (group,) = generator.rollouts(Prompt(token_ids=(5, 9, 13)), temperature=0.0, max_tokens=10, ignore_eos=True)
    return group.completions[0]


def stop_while_it_streams(generator: Generator, max_tokens: int) -> list[RolloutLine]:
    """Send SIGTERM in the middle of an answer. Return the lines of the answer."""
    body = {"prompts": [PROMPT] * 4, "sampling": {"n": 2, "max_tokens": max_tokens, "ignore_eos": True}}
    with generator.client.stream("POST", "/rollouts", json=body) as response:
        generator.process.terminate()
        lines = [RolloutLine.model_validate_json(line) for line in response.iter_lines()]
    assert generator.process.wait(STOP_S) == 0
    return lines


def test_a_restarted_generator_serves_the_version_from_before_the_kill(policy: ReferencePolicy) -> None:
    with generator_of(policy) as killed:
        for version in (V41, V42):
            killed.put(version, policy.publish(version)).raise_for_status()
        before = sampled(killed)
        killed.process.kill()
    with generator_of(policy) as restarted:
        assert restarted.served.version == V42
        assert sampled(restarted) == before
        assert [span.version for span in before.versions] == [V42]
        assert policy.store.leased() == {V42}


def test_sigterm_finishes_running_streams_releases_the_lease_and_exits_0(policy: ReferencePolicy) -> None:
    policy.publish(V42)
    with generator_of(policy, f"{FAULT}token_latency_s", "0.002") as generator:
        lines = stop_while_it_streams(generator, max_tokens=100)
        assert [line.group.prompt_index for line in lines if line.group] == [0, 1, 2, 3]
        assert policy.store.leased() == set()
        assert "Traceback" not in generator.log.read_text()


def test_a_put_that_waits_for_its_version_does_not_delay_the_stop(policy: ReferencePolicy) -> None:
    digest = policy.publish(V42)
    with generator_of(policy, *PATIENT) as generator, ThreadPoolExecutor() as pool:
        answer = pool.submit(generator.put, V43, "0" * 32)
        # A PUT of the served version has no effect. While another switch is in progress, it is refused with 409.
        wait_until(lambda: generator.put(V42, digest).status_code == 409)
        generator.process.terminate()
        assert generator.process.wait(STOP_S) == 0
        assert answer.result().json()["code"] == "weights_not_visible"


def test_a_torn_policy_exits_with_1_even_while_requests_run(policy: ReferencePolicy) -> None:
    faults = [f"{FAULT}load_failures", "2", f"{FAULT}token_latency_s", "0.01"]
    body = {"prompts": [PROMPT], "sampling": {"max_tokens": 2000, "ignore_eos": True}}
    with generator_of(policy, *PATIENT, *faults) as generator, generator.client.stream("POST", "/rollouts", json=body):
        answer = generator.put(V42, policy.publish(V42), SwitchMode.IN_FLIGHT)
        assert (answer.status_code, answer.json()["code"]) == (503, "policy_torn")
        assert generator.process.wait(STOP_S) == 1
    assert "Traceback" not in generator.log.read_text()


def test_a_store_of_another_model_is_reported_at_the_start_as_a_user_error(
    policy: ReferencePolicy, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", max_position_embeddings=64)
    ReferencePolicy(other, policy.store).publish(V42)
    generator = Generator("mock", policy.model_dir, policy.store.root, log=tmp_path / "log")
    assert generator.process.wait(60) == 2
    *_, message = generator.log.read_text().splitlines()
    assert " ERROR    none of the 1 versions in " in message
    assert "version 42.1 (run 'test') belongs to another model: its config differs" in message
    assert "set shared.weights_dir to a new folder" in message
    assert "Traceback" not in generator.log.read_text()


@pytest.mark.vllm
def test_vllm_starts_with_the_stores_version_and_stops_cleanly(policy: ReferencePolicy) -> None:
    base = policy.greedy(PROMPT["token_ids"], 10)
    policy.change(42)
    digest = policy.publish(V42)
    with generator_of(policy, *PATIENT, engine="vllm") as generator, ThreadPoolExecutor() as pool:
        assert generator.served.version == V42
        greedy = list(sampled(generator).token_ids)
        assert greedy == policy.greedy(PROMPT["token_ids"], 10)
        assert greedy != base
        assert policy.store.leased() == {V42}
        answer = pool.submit(generator.put, V43, "0" * 32)
        wait_until(lambda: generator.put(V42, digest).status_code == 409)
        lines = stop_while_it_streams(generator, max_tokens=100)
        assert sorted(line.group.prompt_index for line in lines if line.group) == [0, 1, 2, 3]
        assert answer.result().json()["code"] == "weights_not_visible"
        assert policy.store.leased() == set()


@pytest.mark.vllm
def test_vllms_server_exits_with_1_when_its_engine_dies(policy: ReferencePolicy) -> None:
    with generator_of(policy, engine="vllm", forks=True) as generator:
        (core,) = psutil.Process(generator.process.pid).children()
        core.kill()
        assert generator.process.wait(2 * STOP_S) == 1
