"""What `tandem demo` decides before it starts a service: CPUs, engine, run folder, location of the weights."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tandem_protocol.config.generator
import tandem_protocol.config.trainer
from tandem_cli import processes, run_folder
from tandem_cli.processes import choose_cpus, describe_exit, split_cpus
from tandem_cli.project import Project, choose_engine
from tandem_protocol.config import ConfigError, load, parse_overrides


def a_project(folder: Path, **overrides: str) -> Project:
    (folder / "config.yaml").write_text(
        "shared: {model: model}\ntrainer: {max_steps: 3, max_lag: 2, rewards: [{function: 'r:r'}]}\n"
    )
    return Project.read(folder, {key.replace("__", "."): value for key, value in overrides.items()})


@given(st.sets(st.integers(0, 500), min_size=2))
def test_the_cpu_sets_are_disjoint_and_use_every_cpu(cpus: set[int]) -> None:
    generator, trainer = split_cpus(sorted(cpus))
    assert not set(generator) & set(trainer)
    assert set(generator) | set(trainer) == cpus
    assert len(generator) - len(trainer) in (0, 1)


def test_a_single_cpu_is_shared() -> None:
    assert split_cpus([3]) == ((3,), (3,))


def test_services_that_take_turns_use_all_cpus() -> None:
    assert choose_cpus([0, 1, 2], take_turns=True) == ((0, 1, 2), (0, 1, 2))
    assert choose_cpus([0, 1, 2], take_turns=False) == split_cpus([0, 1, 2])


def test_hardware_threads_of_one_core_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_first_sibling", lambda cpu: cpu % 4)  # 0 and 4 are one core, 1 and 5 …
    assert split_cpus(range(8)) == ((0, 4, 1, 5), (2, 6, 3, 7))


def test_the_mock_engine_replaces_a_missing_vllm_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    engine, note = choose_engine("vllm")
    assert engine == "mock"
    assert note is not None
    assert "vLLM is not installed" in note
    assert choose_engine("mock") == ("mock", None)


def test_vllm_is_used_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_engine("vllm") == ("vllm", None)


def test_each_service_gets_only_the_overrides_of_its_sections(tmp_path: Path) -> None:
    demo = a_project(tmp_path, trainer__max_steps="5", generator__port="1", shared__generators='["http://a"]')
    assert demo.overrides_for("trainer") == ["--trainer.max_steps=5", '--shared.generators=["http://a"]']
    assert demo.overrides_for("generator") == ["--generator.port=1", '--shared.generators=["http://a"]']


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("007", "007"),
        ('"007"', "007"),
        ("'on'", "on"),
        ("on", "on"),
        ("1e5", "1e5"),
        ("2026-11-25", "2026-11-25"),
        ("a", "a"),
    ],
)
def test_the_demo_and_its_trainer_parse_overrides_alike(tmp_path: Path, words: str, name: str) -> None:
    demo = a_project(tmp_path, trainer__run_name=words, trainer__rewards='[{function: "r:r"}]')
    overrides = parse_overrides(demo.overrides_for("trainer"))
    trainer, _ = load(tandem_protocol.config.trainer.TrainerSettings, path=demo.config, env={}, overrides=overrides)
    assert demo.settings.trainer.run_name == trainer.trainer.run_name == name


@pytest.mark.parametrize("words", ['"a b"', "null", "", "{a: 1}", '"'])
def test_the_demo_refuses_run_names_that_its_trainer_refuses(tmp_path: Path, words: str) -> None:
    with pytest.raises(ConfigError, match="run_name"):
        a_project(tmp_path, trainer__run_name=words)


def test_quoted_overrides_reach_the_services_with_their_quotes(tmp_path: Path) -> None:
    arguments = [
        "--generator.vllm.served_model_name",
        '"no"',
        "--trainer.prompts.chat_template_kwargs",
        "{a: '1', b: 1}",
    ]
    demo = a_project(tmp_path, **{key.replace(".", "__"): words for key, words in parse_overrides(arguments).items()})
    generator = parse_overrides(demo.overrides_for("generator"))
    assert load(tandem_protocol.config.generator.GeneratorSettings, path=demo.config, env={}, overrides=generator)[
        0
    ].generator.vllm == {"served_model_name": "no"}
    trainer = {**parse_overrides(demo.overrides_for("trainer")), "trainer.rewards": '[{function: "r:r"}]'}
    loaded, _ = load(tandem_protocol.config.trainer.TrainerSettings, path=demo.config, env={}, overrides=trainer)
    assert loaded.trainer.prompts.chat_template_kwargs == {"a": "1", "b": 1}


def test_earlier_runs_are_renamed_with_numbers(tmp_path: Path) -> None:
    demo = a_project(tmp_path)
    assert demo.run.set_aside() is None
    for number in (1, 2):
        demo.run_dir.mkdir(parents=True)
        (demo.run_dir / "which").write_text(str(number))
        assert demo.run.set_aside() == tmp_path / f"runs/default.{number}"
    assert (tmp_path / "runs/default.1/which").read_text() == "1"


@pytest.mark.parametrize(("free_bytes", "in_memory"), [(8 * 1000, True), (8 * 1000 - 1, False)])
def test_weights_are_in_memory_only_if_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, in_memory: bool
) -> None:
    memory = tmp_path / "shm"
    demo = a_project(tmp_path)
    for folder in (memory, tmp_path / "model", demo.run_dir):
        folder.mkdir(parents=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(run_folder, "_MEMORY", memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_bytes))
    with demo.run.weights_dir(tmp_path / "model") as directory:
        assert (directory.parent == memory) is in_memory
        assert directory.is_dir()
    assert not directory.exists()


@pytest.mark.parametrize(
    ("code", "text"),
    [(2, "ended with exit code 2"), (137, "was killed by SIGKILL (exit code 137)"), (255, "ended with exit code 255")],
)
def test_an_exit_code_is_described_with_its_signal(code: int, text: str) -> None:
    assert describe_exit(code) == text
