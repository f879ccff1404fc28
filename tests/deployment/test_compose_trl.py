"""`TANDEM_SCRIPT=train.py docker compose up`: a TRL script that knows nothing of Tandem, with the mock generator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.models import make_tiny_model
from support.stack import ROOT, Stack, stack
from support.trl import SCRIPT
from tandem_cli.testing import sweep

pytestmark = pytest.mark.docker

KILL_SCRIPT = """
import os, pathlib, time
deadline = time.monotonic() + 120
while not any(pathlib.Path("/runs/train").rglob("checkpoint-20/trainer_state.json")):
    assert time.monotonic() < deadline, "no checkpoint within 120 s"
    time.sleep(0.05)
for process in pathlib.Path("/proc").glob("[0-9]*"):
    words = (process / "cmdline").read_bytes().split(b"\\0")
    if words[1:3] == [b"-m", b"tandem_trainer.trl"]:
        os.kill(int(process.name), 9)
"""
HAS_VLLM = "import importlib.util; print(importlib.util.find_spec('vllm') is not None)"


@pytest.fixture(scope="session")
def trl_images() -> None:
    """Build the images of a stack with the mock generator and a trainer with TRL."""
    sweep()
    Stack(variables={"TANDEM_SCRIPT": "train.py"}).must("build", timeout_s=1800)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a script, a model, and nothing of Tandem."""
    folder = tmp_path / "project"
    make_tiny_model(folder / "model")
    shutil.copy(SCRIPT, folder / "train.py")
    (folder / "config.yaml").write_text("that: of another program\n")
    return folder


@pytest.fixture
def digits(folder: Path) -> Path:
    """The example, with a model that needs no training."""
    for name in ("train.py", "tandem.yaml"):
        shutil.copy(ROOT / "examples/trl" / name, folder / name)
    rows = [f'{{"prompt": "{number}+1=", "answer": "{number + 1}"}}\n' for number in range(64)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    return folder


@pytest.mark.usefixtures("trl_images")
def test_the_script_runs_unmodified_and_its_output_is_on_the_runs_volume(folder: Path, tmp_path: Path) -> None:
    script = "train.py --model model --out out --trainers grpo rloo"
    with Stack(folder, variables={"TANDEM_SCRIPT": script}) as made:
        has_vllm = made.python("trainer", HAS_VLLM)
        assert made.wait(timeout_s=150) == 0, made.logs()
        runs = made.copy_runs(tmp_path / "runs")
    assert "False" in has_vllm
    run = runs / "train"
    assert (run / "out/grpo/model.safetensors").exists()
    assert (run / "out/rloo/model.safetensors").exists()
    lines = {file.name: len(file.read_text().splitlines()) for file in run.glob("metrics*.jsonl")}
    assert lines == {"metrics.jsonl": 3, "metrics.1.jsonl": 3}, "one file for each trainer of the script"


@pytest.mark.usefixtures("trl_images")
def test_a_killed_script_resumes_from_its_checkpoint(digits: Path) -> None:
    with Stack(digits, variables={"TANDEM_SCRIPT": "train.py --max_steps 25"}) as made:
        made.python("trainer", KILL_SCRIPT)
        assert made.wait(timeout_s=150) == 0, made.logs()
        records = made.metrics()
    assert [record["step"] for record in records] == list(range(1, 26))
    assert records[-1]["version"] == "24.2", "the second start of the script ends the run"


@pytest.mark.usefixtures("trl_images")
@pytest.mark.parametrize(
    ("script", "status", "expected"),
    [
        ("train.py --model model --out out --mode colocate", 2, "got vllm_mode='colocate', expected 'server'"),
        ("absent.py", 2, "got the script absent.py, which is not in the project's folder"),
        ("raises.py", 1, "ZeroDivisionError"),
    ],
    ids=["colocate", "absent", "raises"],
)
def test_a_mistake_is_found_before_anything_starts_and_shown_by_the_trainer(
    folder: Path, script: str, status: int, expected: str
) -> None:
    (folder / "raises.py").write_text("1 / 0")
    with stack(folder, variables={"TANDEM_SCRIPT": script}) as made:
        result = made.compose("up", "--no-build", "--exit-code-from", "trainer", timeout_s=150)
    assert result.returncode == status
    assert expected in result.stdout
