"""A value in `config.yaml` is read as it is written, or it is refused with the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.config_yaml import AMBIGUOUS_WORDS, Settings, read, refusal
from tandem_protocol.config import load, resolved

# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("1.e-5", 1e-5),
        (".5", 0.5),
        ("1.", 1.0),
        ("+.5e1", 5.0),
        ("1", 1.0),
        ("1_000", 1000.0),
        ("0x10", 16.0),
        ('"1e-5"', 1e-5),
        ("'2'", 2.0),
    ],
)
def test_a_number_may_have_any_notation(tmp_path: Path, written: str, value: float) -> None:
    settings = read(tmp_path, f"optim: {{learning_rate: {written}, betas: [{written}]}}").optim
    assert (settings.learning_rate, settings.betas) == (value, (value,))
    assert type(settings.learning_rate) is float


@pytest.mark.parametrize(
    ("written", "value"),
    [("5", 5), ("+5", 5), ("2.0", 2), ("1e3", 1000), ("1e+06", 10**6), ("1_000", 1000), ("0x10", 16), ("0o17", 15),
     ('"5"', 5)],
)  # fmt: skip
def test_an_integer_may_have_any_notation(tmp_path: Path, written: str, value: int) -> None:
    settings = read(tmp_path, f"max_steps: {written}\nlimit: {written}")
    assert (settings.max_steps, settings.limit) == (value, value)
    assert type(settings.max_steps) is int


@pytest.mark.parametrize(
    "written", ["true", "on", "no", "2.5", "1e-5", "1:30", "2026-11-25", "0b11", ".inf", ".nan", "nan", "[1]", "007"]
)
@pytest.mark.parametrize("key", ["max_steps", "limit"])
def test_a_value_that_is_not_an_integer_is_refused(tmp_path: Path, key: str, written: str) -> None:
    message = refusal(tmp_path, f"\n{key}: {written}")
    assert message.startswith(f"trainer.{key}")
    assert "config.yaml, line 3" in message


@pytest.mark.parametrize(
    "written", ["true", "yes", "1:30", "2026-11-25", ".inf", "-.inf", ".nan", "nan", "inf", "1e999", "010"]
)
def test_a_value_that_is_not_a_finite_number_is_refused(tmp_path: Path, written: str) -> None:
    message = refusal(tmp_path, f"temperature: {written}")
    assert message.startswith("trainer.temperature")
    assert "expected a" in message or "quote" in message


def test_a_number_that_yaml_versions_read_differently_is_refused_with_both_readings(tmp_path: Path) -> None:
    message = refusal(tmp_path, "max_steps: 010")
    assert "got 010 without quotes, which YAML 1.1 reads as 8 and YAML 1.2 as 10" in message
    assert "write 10 for the number" in message


# -- booleans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [("true", True), ("True", True), ("yes", True), ("on", True), ("y", True), ("1", True), ('"true"', True),
     ("false", False), ("FALSE", False), ("no", False), ("Off", False), ("n", False), ("0", False)],
)  # fmt: skip
def test_a_boolean_may_have_any_notation(tmp_path: Path, written: str, value: bool) -> None:
    assert read(tmp_path, f"shuffle: {written}").shuffle is value


@pytest.mark.parametrize("written", ["2", "maybe", "1.5", "null"])
def test_a_value_that_is_not_a_boolean_is_refused(tmp_path: Path, written: str) -> None:
    assert refusal(tmp_path, f"shuffle: {written}").startswith("trainer.shuffle")


def test_a_choice_accepts_only_its_words(tmp_path: Path) -> None:
    assert read(tmp_path, "mode: off").mode == "off"
    assert "expected 'on' or 'off'" in refusal(tmp_path, "mode: yes")


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", AMBIGUOUS_WORDS)
@pytest.mark.parametrize(
    "text", ["run_name: {}", "output_dir: {}", "names: [a, {}]", "env: {{A: {}}}", "rewards: [{{function: {}}}]"]
)
def test_text_that_some_yaml_version_reads_differently_must_be_quoted(tmp_path: Path, text: str, word: str) -> None:
    message = refusal(tmp_path, text.format(word))
    assert "expected" in message
    if word not in ("null", "~"):
        assert f"got {word} without quotes" in message
        assert f'Fix: quote text: "{word}"' in message
        assert "config.yaml, line 2" in message
    for quoted in (f'"{word}"', f"'{word}'", f"!!str {word}"):
        settings = read(tmp_path, text.format(quoted))
        assert word in (
            settings.run_name,
            str(settings.output_dir),
            *settings.names,
            *settings.env.values(),
            *(reward.function for reward in settings.rewards),
        )


@pytest.mark.parametrize(
    "word", ["a", "y", "n", "nan", "None", "a:b", "http://x:1", "org/model-7b", "1.2.3", "v1", "a#b"]
)
def test_other_text_needs_no_quotes(tmp_path: Path, word: str) -> None:
    settings = read(tmp_path, f"run_name: {word}\narguments: {{a: {word}}}")
    assert (settings.run_name, settings.arguments) == (word, {"a": word})


# -- mappings that take anything --------------------------------------------------------------------------------------


FREE: list[tuple[str, Any]] = [
    ("1e-5", 1e-5),
    ("1e5", 1e5),
    (".5", 0.5),
    ("7", 7),
    ("0x10", 16),
    ("true", True),
    ("null", None),
    ("", None),
    ("text", "text"),
    ("y", "y"),
    ('"no"', "no"),
    ('"1e-5"', "1e-5"),
    ("[1, a, null]", [1, "a", None]),
    ("{b: {c: 1e-5}}", {"b": {"c": 1e-5}}),
    ("[{b: 1}]", [{"b": 1}]),
    ("{}", {}),
    ("[]", []),
]


@pytest.mark.parametrize(("written", "value"), FREE)
def test_a_mapping_that_takes_anything_is_read_as_yaml_1_2(tmp_path: Path, written: str, value: object) -> None:
    settings = read(tmp_path, f"arguments: {{a: {written}}}\nrewards: [{{function: f, arguments: {{a: {written}}}}}]")
    assert settings.arguments == settings.rewards[0].arguments == {"a": value}
    assert type(settings.arguments["a"]) is type(value)


@pytest.mark.parametrize("word", ["on", "off", "yes", "No", "007", "010", "1_000", "1:30", "0b11", "2026-11-25", "089"])
@pytest.mark.parametrize(
    "text", ["arguments: {{a: {}}}", "arguments: {{a: [{}]}}", "rewards: [{{function: f, arguments: {{a: {}}}}}]"]
)
def test_a_mapping_that_takes_anything_refuses_words_with_two_readings(tmp_path: Path, text: str, word: str) -> None:
    message = refusal(tmp_path, text.format(word))
    assert f"got {word} without quotes, which YAML 1.1 reads as" in message
    assert f'quote text: "{word}"' in message
    quoted = read(tmp_path, text.format(f'"{word}"'))
    assert word in str([quoted.arguments, quoted.rewards])


def test_resolved_returns_every_value_with_its_source(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("trainer:\n  optim: {learning_rate: 1e-5}\n  env: {a.b: x}\n")
    rows = {row.key: (row.value, row.source) for row in resolved(*load(Settings, path=path, env={}))}
    assert rows["trainer.optim.learning_rate"] == (1e-5, str(path))
    assert rows['trainer.env."a.b"'] == ("x", str(path))
