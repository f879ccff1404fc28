"""`tandem export` writes the selected checkpoint, or lists those that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem_cli.__main__ import main


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 20 and 100; step 20 has the best evaluation."""
    for step in (20, 100):
        checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / f"{step:06d}"
        (checkpoint / "model").mkdir(parents=True)
        (checkpoint / "model" / "config.json").write_text(str(step))
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "best": {"step": 20, "reward_mean": 0.5}}))
    (tmp_path / "runs" / "mine" / "checkpoints" / ".staging-000120").mkdir()
    return tmp_path / "runs" / "mine"


@pytest.mark.parametrize(("arguments", "step"), [([], "100"), (["best"], "20"), (["last"], "100"), (["20"], "20")])
def test_export_writes_the_selected_checkpoint(run_dir: Path, tmp_path: Path, arguments: list[str], step: str):
    target = tmp_path / "out" / "model"
    which = [f"--checkpoint={word}" for word in arguments]
    assert main(["export", str(run_dir), *which, "--to", str(target)]) == 0
    assert (target / "config.json").read_text() == step
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def _refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["export", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_missing_checkpoint_is_refused_with_those_that_exist(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    to = ("--to", tmp_path / "out")
    assert "one of the steps 20, 100" in _refusal(capsys, run_dir, "--checkpoint", "40", *to)
    assert "holds no checkpoint" in _refusal(capsys, run_dir.parent, *to)
    (run_dir / "checkpoints" / "000100" / "state.json").write_text('{"step": 100}')
    assert "trainer.checkpoint.keep_best" in _refusal(capsys, run_dir, "--checkpoint", "best", *to)
    (run_dir / "checkpoints" / "000100" / "model" / "config.json").unlink()
    assert "holds no Hugging Face model" in _refusal(capsys, run_dir, *to)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_refused_with_the_command_that_merges_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = run_dir / "checkpoints" / "000100" / "model"
    (model / "config.json").rename(model / "adapter_config.json")
    error = _refusal(capsys, run_dir, "--to", tmp_path / "out")
    assert f"python -m tandem_trainer.merge {model} {tmp_path / 'out'}" in error


def test_a_target_folder_that_is_not_empty_is_refused_and_unchanged(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    error = _refusal(capsys, run_dir, "--to", tmp_path / "used")
    assert "is not empty, expected a new or empty folder" in error
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


def test_a_failed_copy_is_reported_and_leaves_nothing_behind(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        (tmp_path / ".out.part").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    assert "cannot be copied to" in (error := _refusal(capsys, run_dir, "--to", tmp_path / "out"))
    assert "No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
