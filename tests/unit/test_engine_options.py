"""Options for vLLM: how they become command-line words, and which ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem_generator.engine_options import as_words, names_of
from tandem_generator.options import Options, parse
from tandem_protocol.config import ConfigError, Section, load
from tandem_protocol.config.generator import GeneratorSettings
from tandem_protocol.config.project import ProjectSettings
from tandem_protocol.config.vllm_options import refuse_owned


def from_yaml(tmp_path: Path, section: str, *words: str) -> Options:
    path = tmp_path / "config.yaml"
    path.write_text(f"shared: {{model: m}}\ngenerator:\n{section}\n")
    return parse(["--config", str(path), *words])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (64, ["--x-y", "64"]),
        (0.5, ["--x-y", "0.5"]),
        ("a b", ["--x-y", "a b"]),
        (True, ["--x-y"]),
        (False, ["--no-x-y"]),
        (None, []),
        ([1, 2], ["--x-y", "1", "2"]),
        (["a", "b c"], ["--x-y", "a", "b c"]),
        ([[1, 2], {"a": 1}], ["--x-y", "[1, 2]", '{"a": 1}']),
        ({"a": [1], "b": True, "c": None}, ["--x-y", '{"a": [1], "b": true, "c": null}']),
    ],
)
def test_an_option_is_converted_to_command_line_words(value: Any, words: list[str]) -> None:
    assert as_words({"x_y": value}) == words


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generator\.vllm\.x: got an empty list"):
        as_words({"x": []})


def test_a_list_in_the_yaml_is_one_word_per_item(tmp_path: Path) -> None:
    got = from_yaml(tmp_path, "  vllm: {cudagraph_capture_sizes: [1, 2, 4], served_model_name: [a, b]}")
    assert got.engine_args == ["--cudagraph-capture-sizes", "1", "2", "4", "--served-model-name", "a", "b"]


@pytest.mark.parametrize("twin", ["max-num-seqs", "MAX_NUM_SEQS", "Max_Num-Seqs"])
def test_two_spellings_of_an_option_are_one_key(tmp_path: Path, twin: str) -> None:
    with pytest.raises(ConfigError, match=r"generator\.vllm\.max_num_seqs is given twice: .*line 4, and .*line 5"):
        from_yaml(tmp_path, f"  vllm:\n    max_num_seqs: 1\n    {twin}: 2")
    got = from_yaml(tmp_path, f"  vllm: {{{twin}: 1}}", "--generator.vllm.max_num_seqs", "2")
    assert got.engine_args == ["--max-num-seqs", "2"]


def test_the_environment_can_set_options_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM__GENERATOR__VLLM__MAX_NUM_SEQS", "8")
    monkeypatch.setenv("TANDEM__GENERATOR__ENV__VLLM_Some_Level", "007")
    got = from_yaml(tmp_path, "  vllm: {max_num_seqs: 1}\n  env: {A.b: x}")
    assert got.engine_args == ["--max-num-seqs", "8"]
    assert got.settings.generator.env == {"A.b": "x", "VLLM_Some_Level": "007"}


REFUSED = {
    "model": "Fix: set shared.model",
    "port": "Fix: set generator.port",
    "host": "Fix: set generator.host",
    "dtype": "Fix: set generator.dtype",
    "tensor_parallel_size": "Fix: set generator.tensor_parallel_size",
    "shutdown_timeout": "Fix: set generator.shutdown_timeout_s",
    "uds": "Fix: set generator.host and generator.port",
    "api_server_count": "the served version is kept in one server process",
    "logprobs_mode": "logprobs of the distribution that is sampled from",
    "middleware": "to check the bearer token",
    "weight_transfer_config": "to load new weights into the engine",
    "config": "put them under generator.vllm",
    "grpc": "trainers use HTTP",
    "hf_overrides": "but not in the trainer",
    "tokenizer": "but not in the trainer",
    "lora_target_modules": "ignore the adapter on all other layers",
    "logits_processors": "it would change what is sampled",
    "watermark_config": "it would change what is sampled",
    "override_generation_config": "set trainer.rollout",
    "generation_config": "expected auto or vllm",
    "runner": "expected auto or generate",
}


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("spell", [str, lambda name: name.replace("_", "-"), str.upper])
def test_a_reserved_option_is_refused_in_the_yaml_with_the_reason(tmp_path: Path, option: str, spell: Any) -> None:
    with pytest.raises(ConfigError, match=f"got the option {option} .*{REFUSED[option]}"):
        from_yaml(tmp_path, f"  vllm: {{{spell(option)}: text}}")


OURS = ("model", "port", "host", "dtype", "tensor_parallel_size", "config")
"""Options with the same name on the generator's own command line."""


@pytest.mark.parametrize(
    "tool", [GeneratorSettings, ProjectSettings], ids=["generator and preflight", "demo and doctor"]
)
def test_whoever_reads_the_section_refuses_a_reserved_option(tmp_path: Path, tool: type[Section]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("shared: {model: m}\ngenerator: {vllm: {Logprobs-Mode: raw_logits}}\ntrainer: {max_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"generator\.vllm \(from .*: got the option logprobs_mode for vLLM"):
        load(tool, path=path)


@pytest.mark.parametrize("option", [name for name in REFUSED if name not in (*OURS, "generation_config", "runner")])
@pytest.mark.parametrize("form", ["--{} x", "--{}=x", "--{}.key x", "--no-{}"])
def test_a_reserved_option_is_refused_on_the_command_line(option: str, form: str) -> None:
    for name in (option, option.replace("_", "-")):
        with pytest.raises(ConfigError, match=f"got the option {option} "):
            parse(["--model", "m", *form.format(name).split()])


def test_other_options_and_harmless_values_are_accepted() -> None:
    refuse_owned({"generation_config": "vllm", "runner": "generate", "max_num_seqs": 1, "enable_lora": True})
    refuse_owned({"speculative_config": {"method": "ngram"}})
    assert names_of(["--max_num-seqs=1", "2", "-O3", "--no-a-b", "--a.b.c", "x"]) == ["max_num_seqs", "a_b", "a"]


def test_speculation_that_accepts_wrong_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected standard or block"):
        refuse_owned({"speculative_config": {"rejection_sample_method": "synthetic"}})


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["-tp", "2"], "tensor_parallel_size", 2),
        (["-dp", "4"], "data_parallel_size", 4),
        (["--no-enforce-eager"], "enforce_eager", False),
        (["--no-enable_prefix_caching"], "enable_prefix_caching", False),
    ],
)
def test_vllms_short_and_negated_options_are_accepted(words: list[str], key: str, value: object) -> None:
    got = parse(["--model", "m", *words])
    assert getattr(got.settings.generator, key) == value
    assert got.engine_args == []


def test_a_key_given_in_two_forms_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got both --port and --generator\.port, expected one of them"):
        parse(["--model", "m", "--port", "1", "--generator.port", "2"])
