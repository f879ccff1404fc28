"""tandem_cli.testing, as docs/integrate/testing.md documents it for users' own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import pytest

from support import trl
from support.blocks import blocks
from support.chatml import make_chatml_model
from support.models import make_tiny_model
from support.reference_policy import ReferencePolicy
from support.stack import ROOT
from tandem_cli.testing import GeneratorContainer, sweep
from tandem_protocol.messages import Info, RolloutLine, ServedWeights, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("mock_images")]

REQUEST = {"prompts": [{"token_ids": [1, 2, 3]}], "sampling": {"n": 4, "max_tokens": 8}}
ABANDON = """
import os
from tandem_cli.testing import GeneratorContainer
print(GeneratorContainer().start().get_wrapped_container().name, flush=True)
os._exit(0)
"""


@pytest.fixture(autouse=True)
def _without_ryuk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testcontainers.core.config.testcontainers_config.ryuk_disabled", True)


def run_examples(folder: Path, paths: Mapping[str, Path], *, python: Path, with_trl: bool) -> str:
    """Write the page's files of tests, with and without TRL, into a folder, and run them. Returns the output."""
    examples = [block.text for block in blocks("docs/integrate/testing.md", language="python")]
    chosen = [example for example in examples if ("tandem_trainer.trl" in example) == with_trl]
    for number, example in enumerate(chosen):
        for shown, path in paths.items():
            example = example.replace(shown, str(path))
        (folder / f"test_example_{number}.py").write_text(example)
    without_options = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # such as CI's -m
    return subprocess.run(
        [python, "-m", "pytest", "-q", *folder.glob("test_example_*.py")],
        cwd=folder,
        env={**without_options, "TESTCONTAINERS_RYUK_DISABLED": "true", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    ).stdout


def test_the_examples_of_the_documentation_pass(project: Path, tmp_path: Path) -> None:
    paths = {
        "/path/to/project": project,
        "/path/to/tandem": ROOT,
        "/path/to/model": make_chatml_model(tmp_path / "model"),
    }
    output = run_examples(tmp_path, paths, python=Path(sys.executable), with_trl=False)
    assert "3 passed" in output, output


@pytest.mark.trl
def test_the_documented_test_of_a_trl_script_passes_without_vllm(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    shutil.copy(ROOT / "examples/trl/train.py", tmp_path)
    rows = [f'{{"prompt": "{number}+1=", "answer": "{number + 1}"}}\n' for number in range(64)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    paths = {"/path/to/train.py": tmp_path / "train.py", "/path/to/model": tmp_path / "model"}
    output = run_examples(tmp_path, paths, python=trl.NEWEST, with_trl=True)
    assert "1 passed" in output, output


def test_a_generator_serves_weights_that_the_test_publishes(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    policy = ReferencePolicy(tmp_path / "model", WeightStore(tmp_path / "weights"))
    with (
        GeneratorContainer(model=tmp_path / "model", weights_dir=tmp_path / "weights") as generator,
        generator.client as client,
    ):
        info = Info.model_validate(client.get("/info").raise_for_status().json())
        assert info.model == "/model"
        version = Version(1, 1)
        body = {"manifest_digest": policy.publish(version), "mode": SwitchMode.DRAIN}
        served = ServedWeights.model_validate(client.put(f"/weights/{version}", json=body).raise_for_status().json())
    assert served.version == version
    assert list((tmp_path / "weights" / "served").glob("*.json")), "the generator has written its lease"


def test_faults_reach_the_engine_and_the_token_is_required() -> None:
    with GeneratorContainer(faults={"error_rate": 1.0}) as generator, generator.client as client:
        assert client.get("/info", headers={"Authorization": "Bearer wrong"}).status_code == 401
        lines = client.post("/rollouts", json=REQUEST).raise_for_status().text.splitlines()
        assert RolloutLine.model_validate_json(lines[-1]).error is not None


def test_a_script_reaches_the_engine_as_a_file_and_as_rows(tmp_path: Path) -> None:
    rows = [{"turns": [[7, 8, 9]]}]
    (tmp_path / "script.yaml").write_text("- turns: [[7, 8, 9]]\n")
    for script in (rows, tmp_path / "script.yaml", str(tmp_path / "script.yaml")):
        with GeneratorContainer(script=script) as generator, generator.client as client:
            line = RolloutLine.model_validate_json(client.post("/rollouts", json=REQUEST).raise_for_status().text)
            assert line.group is not None
            assert {completion.token_ids for completion in line.group.completions} == {(7, 8, 9, 0)}


def test_sweep_removes_the_containers_of_killed_tests_only() -> None:
    name = subprocess.run(
        [sys.executable, "-c", ABANDON],
        env={**os.environ, "TESTCONTAINERS_RYUK_DISABLED": "true"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    ).stdout.strip()
    engine = docker.from_env(timeout=60)
    assert engine.containers.get(name).status == "running"
    with GeneratorContainer() as ours, ours.client as client:
        with ThreadPoolExecutor(4) as threads:  # several test processes start at the same time
            for done in [threads.submit(sweep) for _ in range(4)]:
                done.result()
        assert client.get("/readyz").status_code == 200, "containers of living processes are kept"
    assert name not in [container.name for container in engine.containers.list(all=True, ignore_removed=True)]
