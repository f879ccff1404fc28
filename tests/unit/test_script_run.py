"""What a stack does for a TRL script: its folder, its needs, and the settings of its services."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_cli.script import Gpus, Script
from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.reading import read_file
from tandem_protocol.config.trl import THE_SCRIPTS, ScriptSettings, TrlTrainerConfig
from tandem_protocol.config.writing import to_yaml
from tandem_protocol.script import ScriptNeeds, run_name, script_command
from tandem_trainer import script_run
from tandem_trainer.launch import trainer_command

NEEDS = ScriptNeeds("/models/a", max_model_len=128)
YAML = 'generator: {dtype: float32, max_model_len: 64, vllm: {x: 5, y: "5"}, env: {A: "1"}}\n'


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    file.touch()
    return file


def enter(source: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(source)  # so that the working directory is restored
    monkeypatch.setenv("TANDEM__TRAINER__OUTPUT_DIR", str(runs))
    script_run.enter({"TANDEM_SCRIPT": "train.py", "TANDEM_SCRIPT_FOLDER": str(source)}, [])
    return Path.cwd()


def test_a_script_runs_in_a_copy_of_its_folder_in_the_runs_folder(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows").write_text("rows")
    (tmp_path / ".tandem-lock").touch()
    here = enter(script.parent, tmp_path / "runs", monkeypatch)
    assert here == tmp_path / "runs/train"
    assert {str(p.relative_to(here)) for p in here.rglob("*")} >= {"train.py", "data", "data/rows"}
    assert not (here / ".tandem-lock").exists()


def test_output_of_the_script_is_not_replaced_by_an_older_file_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, runs = tmp_path / "source", tmp_path / "runs"
    source.mkdir()
    for name in ("edited", "written"):
        (source / name).write_text("old")
    here = enter(source, runs, monkeypatch)
    (here / "written").write_text("new")
    later = (source / "edited").stat().st_mtime + 10
    (source / "edited").write_text("new")
    os.utime(source / "edited", (later, later))
    enter(source, runs, monkeypatch)
    assert (here / "written").read_text() == "new"
    assert (here / "edited").read_text() == "new"


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert script_run.newest_checkpoint(tmp_path) == -1
    for step in (5, 20, 100):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
    for step in (5, 20):
        (tmp_path / f"out/checkpoint-{step}/trainer_state.json").touch()
    assert script_run.newest_checkpoint(tmp_path) == 20


def test_the_launcher_runs_the_script_with_its_arguments_in_place_of_the_trainer() -> None:
    env = {"TANDEM_SCRIPT": "train.py --name 'a b'"}
    command = trainer_command(env, ["--config", "c", "--resume"])
    assert command[1:] == ["-m", "tandem_trainer.trl", "--config", "c", "--resume", "train.py", "--name", "a b"]


def test_an_open_quote_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="No closing quotation"):
        script_command({"TANDEM_SCRIPT": "train.py 'a"})


@given(st.text(min_size=1).filter(lambda name: "/" not in name and "\0" not in name))
def test_every_script_has_a_valid_name_for_its_run(name: str) -> None:
    TrlTrainerConfig(run_name=run_name(f"{name}.py"))


def test_needs_survive_their_file(tmp_path: Path) -> None:
    assert ScriptNeeds.read(tmp_path / "needs") is None
    NEEDS.write(tmp_path / "needs")
    assert ScriptNeeds.read(tmp_path / "needs") == NEEDS


def test_what_the_settings_say_wins_over_what_the_script_needs(script: Path) -> None:
    (script.parent / "tandem.yaml").write_text(YAML)
    assert Script.read(script, []).environment(NEEDS) == {"TANDEM__SHARED__MODEL": "/models/a"}
    named = Script.read(script, [], overrides={"shared.model": "b"})
    needs = ScriptNeeds("a", revision="1")
    assert named.environment(needs) == {"TANDEM__SHARED__MODEL": "b"}, "a revision is that of another model"


def test_yaml_that_is_written_again_means_the_same(tmp_path: Path) -> None:
    file, again = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text(YAML)
    again.write_text(to_yaml(read_file(file)))
    first, second = (load(ScriptSettings, path=path, defaults=THE_SCRIPTS)[0] for path in (file, again))
    assert first == second


@pytest.mark.parametrize(
    ("generator", "trainer", "expected"),
    [("0", None, "expected both"), (None, "1", "expected both"), ("0-1", "1-2", "1")],
)
def test_gpus_are_given_for_both_services_and_differ(generator: Any, trainer: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Gpus.read(generator, trainer)


def test_a_host_with_several_gpus_gives_one_to_each_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_cli.script.gpu_uuids", lambda: {"0": "GPU-a", "1": "GPU-b", "2": "GPU-c"})
    assert Gpus.read(None, None) == Gpus(("0",), ("1",))


def test_a_model_without_a_name_is_refused() -> None:
    from tandem_trainer.trl.needs import needs_of

    trainer = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(_name_or_path="")), args=SimpleNamespace())
    with pytest.raises(ConfigError, match="was not loaded from a folder or from the hub"):
        needs_of(trainer)
