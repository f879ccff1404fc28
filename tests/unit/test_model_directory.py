"""Damaged files of a model are reported by name, before a library reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.models import make_tiny_model
from tandem_generator.__main__ import main
from tandem_protocol.config import ConfigError
from tandem_protocol.model_directory import check_model_directory
from tandem_protocol.processes import USER_ERROR


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(complete: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for file in complete.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def become_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def writes(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    *(
        (name, damage, f"{name} {problem}")
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        for damage, problem in [
            (cut, "is not JSON"),
            (writes(""), "is not JSON"),
            (writes("[]"), "holds list, expected an object"),
            (lambda file: file.write_bytes(b"\xff\xff"), "is not JSON"),
            (become_folder, "cannot be read: Is a directory"),
        ]
    ),
    ("config.json", Path.unlink, "has no config.json"),
    ("model.safetensors", cut, "is not a complete safetensors file: it has"),
    ("model.safetensors", lengthen, "is not a complete safetensors file: it has"),
    ("model.safetensors", writes(""), "it has 0 bytes, which is less than its header says"),
    ("model.safetensors", writes("x" * 1000), "it has 1000 bytes, which is less than its header says"),
    ("model.safetensors", lambda file: file.write_bytes(b"\2\0\0\0\0\0\0\0[]"), "is not a complete safetensors file"),
    ("model.safetensors", lambda file: file.write_bytes(b"\2\0\0\0\0\0\0\0{]"), "is not a complete safetensors file"),
    ("model.safetensors", become_folder, "cannot be read: Is a directory"),
    ("model.safetensors", Path.unlink, "lacks weights, such as model.safetensors"),
    (
        "model.safetensors.index.json",
        writes(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}})),
        "lacks model-1.safetensors",
    ),
]


@pytest.mark.parametrize(("name", "damage", "problem"), DAMAGE)
def test_a_damaged_file_is_reported_with_its_problem(
    model: Path, name: str, damage: Callable[[Path], object], problem: str
) -> None:
    damage(model / name)
    with pytest.raises(ConfigError) as caught:
        check_model_directory(str(model))
    assert str(caught.value).startswith(f"shared.model: {model}")
    assert problem in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_complete_model_and_an_id_on_the_hub_are_accepted(complete: Path) -> None:
    check_model_directory(str(complete))
    for name in ("gpt2", "org/name", "org/name-1.5_x", "model"):
        check_model_directory(name)


@pytest.mark.parametrize("name", ["./none", "/none", "../none", "a/b/c", "~/model", "org/", "größe/x y"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a directory with a Hugging Face model"):
        check_model_directory(name)


def test_missing_files_are_accepted_if_no_weights_are_needed(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "config.json").unlink()
    check_model_directory(str(model), needs_weights=False)


def test_the_generator_reports_a_damaged_model_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model)
    cut(model / "model.safetensors")
    for engine in ("mock", "vllm"):
        assert main(["--model", str(model), "--engine", engine]) == USER_ERROR
        (line,) = capsys.readouterr().err.splitlines()
        assert f" ERROR    shared.model: {model / 'model.safetensors'} is not a complete safetensors file" in line
