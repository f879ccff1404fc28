"""The generator's command line: TRL's options, Tandem's options, and options that are passed to vLLM."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem_generator.__main__ import main
from tandem_generator.options import Options, parse
from tandem_protocol.config import ConfigError
from tandem_protocol.processes import USER_ERROR


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` changes into the project's folder."""
    monkeypatch.chdir(tmp_path)


def options(*words: str) -> Options:
    return parse(["--model", "m", *words])


TRL = [
    ("model", "shared.model", "org/other", "org/other"),
    ("revision", "shared.revision", "abc123", "abc123"),
    ("tensor_parallel_size", "generator.tensor_parallel_size", "2", 2),
    ("data_parallel_size", "generator.data_parallel_size", "4", 4),
    ("host", "generator.host", "0.0.0.0", "0.0.0.0"),
    ("port", "generator.port", "8123", 8123),
    ("gpu_memory_utilization", "generator.gpu_memory_utilization", "0.5", 0.5),
    ("dtype", "generator.dtype", "bfloat16", "bfloat16"),
    ("max_model_len", "generator.max_model_len", "512", 512),
    ("enable_prefix_caching", "generator.enable_prefix_caching", "false", False),
    ("enforce_eager", "generator.enforce_eager", "True", True),
    ("trust_remote_code", "shared.trust_remote_code", "true", True),
]
"""Every option that `trl vllm-serve` documents: its name, Tandem's key, a text, and the value of the text."""


@pytest.mark.parametrize("spelling", ["--{}", "--{}="], ids=["space", "equals"])
@pytest.mark.parametrize("hyphens", [True, False], ids=["hyphens", "underscores"])
@pytest.mark.parametrize(("name", "key", "text", "value"), TRL, ids=[row[0] for row in TRL])
def test_trls_options_are_accepted_in_every_spelling(
    name: str, key: str, text: str, value: object, hyphens: bool, spelling: str
) -> None:
    option = spelling.format(name.replace("_", "-") if hyphens else name)
    got = options(*([option + text] if option.endswith("=") else [option, text]))
    assert setting(got, key) == value
    assert got.sources[key] == "command line"
    assert got.engine_args == []


@pytest.mark.parametrize("name", ["enable_prefix_caching", "enforce_eager", "trust_remote_code"])
def test_a_bare_flag_is_true(name: str) -> None:
    section = "shared" if name == "trust_remote_code" else "generator"
    assert setting(options(f"--{name}", "--port", "1"), f"{section}.{name}") is True


def test_any_configuration_key_can_be_set_by_its_dotted_name() -> None:
    got = options(
        "--generator.mock.faults.latency_s", "0.5", "--shared.weights_dir=/w", "--generator.vllm", "{max_num_seqs: 64}"
    )
    assert got.settings.generator.mock.faults.latency_s == 0.5
    assert got.settings.shared.weights_dir == Path("/w")
    assert got.settings.generator.vllm == {"max_num_seqs": 64}
    assert got.engine_args == ["--max-num-seqs", "64"]


def test_keys_of_the_trainer_are_ignored() -> None:
    assert options("--engine", "mock", "--trainer.max_steps", "5").settings.generator.engine == "mock"


def test_a_dotted_name_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--generator\.port has no value"):
        options("--generator.port")


def test_other_options_are_passed_to_vllm_after_the_configured_ones(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "shared: {model: m}\n"
        "generator:\n"
        "  vllm: {max_num_seqs: 64, disable_log_stats: true, async_scheduling: false, seed: null,\n"
        "         compilation_config: {level: 3}}\n"
    )
    words = ["--block-size", "32", "--port", "1", "--max_num_batched_tokens=256", "-O3"]
    assert parse(["--config", str(config), *words]).engine_args == [
        "--max-num-seqs", "64", "--disable-log-stats", "--no-async-scheduling", "--compilation-config", '{"level": 3}',
        "--block-size", "32", "--max-num-batched-tokens=256", "-O3",
    ]  # fmt: skip


def test_the_mock_refuses_options_of_vllm() -> None:
    with pytest.raises(ConfigError, match="got --block-size 32, expected no vLLM options with --engine mock"):
        options("--engine", "mock", "--block-size", "32")


def test_an_unknown_key_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"'generator\.max_model_length'.*did you mean 'generator\.max_model_len'\?"):
        options("--generator.max_model_length", "5")


def test_check_prints_every_value_with_its_source_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("shared: {model: m}\ngenerator: {dtype: float32}\n")
    assert main(["--config", str(config), "--check", "--port", "8123"]) == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["generator.port"] == "8123  # command line"
    assert lines["generator.dtype"] == f"'float32'  # {config}"
    assert lines["generator.engine"] == "'vllm'  # default"


def test_relative_paths_start_at_the_folder_of_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.yaml").write_text("shared: {model: m}\ngenerator: {}\n")
    (project / "token").write_text("t0ken\n")
    monkeypatch.setenv("TANDEM_TOKEN_FILE", "token")
    assert main(["--config", "project/config.yaml", "--check"]) == 0
    assert Path.cwd() == project


MISTAKES: list[tuple[list[str], str]] = [
    (["--engine", "mock", "--port", "many"], "generator.port: got 'many' (from command line)"),
    (["--engine", "tgi"], "generator.engine: got 'tgi'"),
    (["--engine", "mock", "--tensor-parallel-size", "0"], "generator.tensor_parallel_size: got 0"),
    (["--config", "absent.yaml"], "absent.yaml cannot be read"),
    (["--engine", "vllm", "--model", "/absent"], "shared.model: got /absent, which is not a directory"),
    (["--engine", "mock", "--model", "./absent"], "shared.model: got ./absent, which is not a directory"),
    (["--engine", "mock", "--host", "0.0.0.0"], "generator.host 0.0.0.0 can be reached from other machines"),
    (["--generator.generator_id", ".."], "generator.generator_id: got '..'"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[message.split(":")[0] for _, message in MISTAKES])
def test_a_user_error_is_reported_in_one_line_with_exit_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "m", *words]) == USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"\S+ \S+ ERROR    \S", line)
    assert message in line


def test_a_missing_token_file_is_reported_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_TOKEN_FILE", str(tmp_path / "absent"))
    assert main(["--model", "m", "--engine", "mock"]) == USER_ERROR
    assert f"TANDEM_TOKEN_FILE={tmp_path / 'absent'} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text"), [("config.json", '{"vocab'), ("model.safetensors", "no header")])
def test_a_damaged_model_is_reported_with_the_path_of_its_file(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["--model", str(tmp_path), "--engine", "mock"]) == USER_ERROR
    assert f"ERROR    shared.model: {tmp_path / name} is not" in capsys.readouterr().err


def test_a_missing_vllm_is_reported_with_the_alternatives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    assert main(["--model", "m"]) == USER_ERROR
    message = capsys.readouterr().err
    assert "vLLM is not installed here" in message
    assert "generator-cpu.txt" in message
    assert "--engine mock" in message


def setting(got: Options, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(got.settings, section), name)
