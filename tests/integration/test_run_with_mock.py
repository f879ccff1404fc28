"""`tandem run`: a TRL script that knows nothing of Tandem, with the mock engine."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from support import trl
from support.models import make_tiny_model
from support.script_runs import Run
from support.stack import ROOT

pytestmark = [pytest.mark.trl, pytest.mark.slow]


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """A folder with a script and nothing of Tandem."""
    (tmp_path / "train.py").write_text(trl.SCRIPT.read_text())
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def test_the_generator_gets_the_model_of_the_script_and_the_run_its_files(folder: Path) -> None:
    run = Run(folder, "train.py", "--model", "model", "--out", "out")
    status, output = run.finish()
    assert status == 0, run.errors
    assert "step 3/3  reward" in output
    assert re.search("policy +version 3.1", output), "the version that was published last"
    assert [(record["step"], record["version"]) for record in run.records()] == [(1, "0.1"), (2, "1.1"), (3, "2.1")]
    first = run.records()[0]
    assert first["reward_mean"] == first["reward"] > 0
    assert first["rollout_tokens"] > 0
    assert first["timings"].keys() == {"wait_for_rollouts_s", "publish_s", "other_s"}
    assert {row["step"] for row in run.records("rollouts")} == {1, 2, 3}
    status_file = json.loads((folder / "runs/train/status.json").read_text())
    assert (status_file["phase"], status_file["version"]) == ("finished", "3.1")
    assert (folder / "out/grpo/model.safetensors").exists(), "the script's own output is where the script says"


def test_ctrl_c_ends_both_with_a_checkpoint_from_which_resume_goes_on(folder: Path) -> None:
    words = ("train.py", "--model", "model", "--out", "out", "--steps")
    run = Run(folder, *words, "100000")
    for _ in range(1200):
        if (folder / "runs/train/metrics.jsonl").exists() and len(run.records()) > 1:
            break
        time.sleep(0.1)
    run.process.send_signal(signal.SIGINT)
    status, output = run.finish()
    assert status == 130, run.errors
    stopped_at = run.records()[-1]["step"]
    assert (folder / f"out/grpo/checkpoint-{stopped_at}/trainer_state.json").exists()
    assert "tandem run --resume --mock --plain train.py --model model --out out" in output
    resumed = Run(folder, "--resume", *words, str(stopped_at + 2))
    status, _ = resumed.finish()
    assert status == 0, resumed.errors
    assert [record["step"] for record in resumed.records()] == list(range(1, stopped_at + 3))
    assert not (folder / "runs/train/metrics.1.jsonl").exists(), "a run that begins at step 1 would rename the file"
    assert resumed.records()[-1]["version"] == f"{stopped_at + 1}.1", "each command has a weight store of its own"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["absent.py"], "got absent.py, expected the file of a TRL script"),
        (["--port", "x", "train.py"], "invalid int value"),
        (["--generator.dtypo=float32", "train.py"], "did you mean 'generator.dtype'?"),
        (["train.py", "--model", "model", "--out", "out", "--mode", "colocate"], "expected 'server'"),
        (["--generator-gpus", "0", "--trainer-gpus", "0-1", "train.py"], "--generator-gpus"),
    ],
    ids=["absent", "option", "key", "colocate", "gpus"],
)
def test_a_mistake_is_named_and_ends_with_status_2(folder: Path, words: list[str], expected: str) -> None:
    run = Run(folder, *words)
    assert run.finish()[0] == 2
    assert expected in run.errors
    assert "Traceback" not in run.errors


def test_tandem_yaml_beside_the_script_wins_over_the_script(folder: Path) -> None:
    (folder / "tandem.yaml").write_text("generator: {max_model_len: 4}\ntrainer: {run_name: short}\n")
    run = Run(folder, "train.py", "--model", "model", "--out", "out")
    assert run.finish()[0] == 1
    assert "max_model_len" in run.errors
    assert (folder / "runs/short/logs/generator.log").exists()


def test_prepare_is_run_only_beside_a_tandem_yaml(folder: Path) -> None:
    (folder / "prepare.py").write_text("open('prepared', 'x'); raise SystemExit(3)")
    (folder / "empty.py").touch()
    run = Run(folder, "empty.py")
    assert run.finish()[0] == 2
    assert "made no trainer with use_vllm=True" in run.errors
    assert not (folder / "prepared").exists()
    (folder / "tandem.yaml").write_text("trainer: {run_name: mine}")
    run = Run(folder, "train.py")
    assert run.finish()[0] == 1
    assert "the preparation ended with exit code 3" in run.errors
    assert (folder / "prepared").exists()


@pytest.mark.parametrize("python", trl.EACH_VERSION)
def test_the_first_example_runs_unmodified_with_every_version_of_trl(tmp_path: Path, python: Path) -> None:
    shutil.copy(ROOT / "examples/trl/train.py", tmp_path)
    trl.make_readable(make_tiny_model(tmp_path / "model"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "21>", "answer": "12"}\n' * 64)
    run = Run(tmp_path, "train.py", "--max_steps", "3", "--output_dir", "out", python=python)
    status, _ = run.finish()
    assert status == 0, run.errors
    assert [(record["step"], record["version"]) for record in run.records()] == [(1, "0.1"), (2, "1.1"), (3, "2.1")]


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ("online_dpo.py", ()),
        ("number/environment.py", ("--model", "model", "--max_completion_length", "16")),
    ],
    ids=["online_dpo", "environment"],
)
def test_the_other_examples_run_unmodified(folder: Path, example: str, words: tuple[str, ...]) -> None:
    shutil.copy(ROOT / "examples/trl" / example, folder / "train.py")
    (folder / "model").unlink()
    make_tiny_model(folder / "model", max_position_embeddings=4096)
    (template,) = trl.NEWEST.parents[1].glob("lib/*/site-packages/trl/chat_templates/qwen3.jinja")
    shutil.copy(template, folder / "model/chat_template.jinja")  # a template for tools that TRL can parse
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1="}\n' * 64)
    run = Run(folder, "train.py", *words, "--max_steps", "2", "--output_dir", "out")
    status, _ = run.finish()
    assert status == 0, run.errors
    assert [record["step"] for record in run.records()] == [1, 2]
