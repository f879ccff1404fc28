"""`helm test` passes if all generators are ready and the run goes on.

It fails if a generator is missing, does not answer or shares a device, or if the trainer finishes no step.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.generators import TOKEN, running
from support.helm import CHART, one, render
from support.ports import free_port
from tandem_protocol.messages import Info, ModelFingerprint
from tandem_protocol.version import BASE, Version

pytestmark = pytest.mark.helm


@pytest.fixture
def urls(tmp_path: Path) -> Iterator[list[str]]:
    """Two generators with the mock engine."""
    arguments = ("mock", "unknown", tmp_path / "weights")
    with running(*arguments, log=tmp_path / "a") as a, running(*arguments, log=tmp_path / "b") as b:
        yield [f"http://127.0.0.1:{generator.port}" for generator in (a, b)]


def check(
    *urls: str, token: str = TOKEN, replicas: int = 2, ready_timeout_s: float = 60, steps: int = 0
) -> tuple[int, str]:
    """Run the test pod's own command here. Return its exit status and output."""
    (container,) = one(render(), "Pod")["spec"]["containers"]
    *_, python, flag = container["command"]
    assert python == "python3"
    script, _ = container["args"]
    env = {"TANDEM_TOKEN": token, "REPLICAS": str(replicas), "READY_TIMEOUT_S": str(ready_timeout_s)}
    env |= {"MAX_STEPS": str(steps), "STEP_TIMEOUT_S": "1"}
    made = subprocess.run(
        [sys.executable, flag, script, *urls],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return made.returncode, made.stdout + made.stderr


def test_ready_generators_pass(urls: list[str]) -> None:
    status, output = check(*urls)
    assert status == 0, output
    assert output.count("sampled 16 tokens at version 0") == 2, "two prompts × two samples × four tokens from each"


def test_a_wrong_token_a_missing_replica_and_an_unreachable_one_fail(urls: list[str]) -> None:
    status, output = check(*urls, token="another")
    assert (status, "got another token" in output) == (1, True), output
    status, output = check(*urls, replicas=3, ready_timeout_s=3)
    assert (status, "error: fewer than 3 replicas were ready within 3 s" in output) == (1, True), output
    status, output = check(f"http://127.0.0.1:{free_port()}", ready_timeout_s=2)
    assert (status, "error: " in output, "Traceback" in output) == (1, True, False), output


def test_a_trainer_that_finishes_no_step_fails(urls: list[str]) -> None:
    status, output = check(*urls, steps=5)
    assert (status, "error: the trainer finished no step within 1 s" in output) == (1, True), output
    assert "the generators serve version 0.0 of a run of 5 steps" in output


class Served:
    """Stands in for the client of two generators, which serve the next versions at each question."""

    def __init__(self, *versions: str) -> None:
        self.versions = [Version.parse(version) for version in versions]

    async def info(self, timeout_s: float) -> dict[str, Info]:
        version = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
        return {"a": info("g-0"), "b": info("g-1").model_copy(update={"version": version})}


@pytest.mark.parametrize(
    ("versions", "passes"),
    [
        (["3.1", "3.1", "4.1"], True),
        (["3.1"], False),
        (["50.1"], True),  # the run is over
        (["51.1"], True),  # max_steps was lowered
        (["7.1", "5.2", "6.2"], True),  # a step after the trainer has resumed from an earlier checkpoint
        (["7.1", "5.2"], False),
        (["7.1", "7.2"], False),
    ],
)
def test_the_run_passes_as_soon_as_a_step_is_finished_or_all_are(
    versions: list[str], passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    for name, value in {"MAX_STEPS": 50, "POLL_S": 0.001, "STEP_TIMEOUT_S": 0.5}.items():
        monkeypatch.setattr(module, name, value)
    if passes:
        asyncio.run(module.check_run(Served(*versions)))
        return
    with pytest.raises(SystemExit, match="finished no step within"):
        asyncio.run(module.check_run(Served(*versions)))


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", CHART / "files/check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def info(generator_id: str, *devices: str) -> Info:
    return Info(
        generator_id=generator_id, engine="vllm", engine_version="0", model="m", version=BASE, world_size=1,
        fingerprint=ModelFingerprint.model_construct(), devices=devices, max_model_len=8, max_num_seqs=8,
    )  # fmt: skip


def test_replicas_that_share_a_gpu_fail_and_replicas_that_share_cpu_cores_pass(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = script()
    module.check_devices({"a": info("g-0", "cpu:0", "GPU-1"), "b": info("g-1", "cpu:0", "GPU-2")})
    with pytest.raises(SystemExit, match="g-1 and g-0 share GPU-1"):
        module.check_devices({"a": info("g-0", "GPU-1"), "b": info("g-1", "GPU-2", "GPU-1")})


def test_the_test_pod_gets_the_service_name_and_the_number_of_replicas() -> None:
    objects = render({"generator": {"replicas": 3}})
    pod, service = one(objects, "Pod"), one(objects, "Service", "-generator")
    (container,) = pod["spec"]["containers"]
    assert container["args"][1] == f"http://{service['metadata']['name']}:8000"
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert (env["REPLICAS"], env["MAX_STEPS"], env["STEP_TIMEOUT_S"]) == ("3", "150", "600")


def test_a_large_number_of_steps_is_written_as_an_integer() -> None:
    (container,) = one(render({"config": {"trainer": {"max_steps": 1_000_000}}}), "Pod")["spec"]["containers"]
    assert {"name": "MAX_STEPS", "value": "1000000"} in container["env"]


def test_helm_deletes_the_test_pod_after_it_has_printed_the_log() -> None:
    """`helm test --logs` prints the log first. With hook-output-log-policy, Helm 4 would print it on one line."""
    annotations = one(render(), "Pod")["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "test"
    assert {"hook-succeeded", "hook-failed"} <= set(annotations["helm.sh/hook-delete-policy"].split(","))
    assert "helm.sh/hook-output-log-policy" not in annotations
