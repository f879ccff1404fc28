"""Keys, sections and documents of `config.yaml`, and the same keys in the environment and on the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from support.config_yaml import AMBIGUOUS_WORDS, Optim, Reward, Settings, Trainer, read, read_file, refusal
from tandem_protocol.config import ConfigError, load, parse_overrides

# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("trainer: {max_steps: 1}\nshared: {model: m}\ntrainer: {max_steps: 2}\n", "trainer", (1, 3)),
        ("trainer:\n  max_steps: 1\n  limit: 1\n  max_steps: 2\n", "max_steps", (2, 4)),
        ("trainer:\n  optim: {learning_rate: 1,\n    learning_rate: 2}\n", "learning_rate", (2, 3)),
        ("trainer:\n  rewards:\n  - function: f\n    weight: 1\n    weight: 2\n", "weight", (4, 5)),
        ("trainer:\n  arguments:\n    a: {b: 1,\n        'b': 2}\n", "b", (3, 4)),
        ('trainer:\n  max_steps: 1\n  "max_steps": 2\n', "max_steps", (2, 3)),
        ("a: &a {x: 1}\ntrainer:\n  <<: *a\n  <<: *a\n", "<<", (3, 4)),
    ],
)
def test_a_duplicate_key_is_refused_with_both_lines(
    tmp_path: Path, text: str, key: str, lines: tuple[int, int]
) -> None:
    with pytest.raises(ConfigError, match=f"got the key {key} on line {lines[0]} and again on line {lines[1]}"):
        read_file(tmp_path, text)


def test_a_key_in_two_spellings_is_a_duplicate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps is given twice: .*line 1, and .*line 2"):
        read_file(tmp_path, "trainer.max_steps: 1\ntrainer: {max_steps: 2}\n")
    env = {"TANDEM__TRAINER__MAX_STEPS": "1", "TANDEM__trainer__max_steps": "2"}
    with pytest.raises(ConfigError, match=r"given twice: TANDEM__TRAINER__MAX_STEPS, and TANDEM__trainer__max_steps"):
        read_file(tmp_path, "trainer: {}\n", env=env)


def test_anchors_and_merge_keys_are_supported(tmp_path: Path) -> None:
    text = """
trainer:
  optim: &base {learning_rate: 1e-3, betas: [0.5]}
  eval:
    <<: *base
    learning_rate: 1e-4
  arguments: {<<: [{a: 1, b: 1}, {b: 2, c: 2}], c: 3}
"""
    settings = read_file(tmp_path, text)
    assert settings.eval == Optim(learning_rate=1e-4, betas=(0.5,))
    assert settings.arguments == {"a": 1, "b": 1, "c": 3}


@pytest.mark.parametrize("key", ["1", "null", "on", "yes", "1.5", "2026-11-25", "~"])
@pytest.mark.parametrize("text", ["arguments: {{{}: x}}", "{}: x"])
def test_a_key_that_some_yaml_version_does_not_read_as_text_must_be_quoted(tmp_path: Path, text: str, key: str) -> None:
    assert f'Fix: quote it: "{key}"' in refusal(tmp_path, text.format(key))
    if text.startswith("arguments"):
        assert read(tmp_path, text.format(f'"{key}"')).arguments == {key: "x"}


def test_keys_of_mappings_keep_their_case_and_dots(tmp_path: Path) -> None:
    text = "env: {A.b: x}\narguments: {A.b: {C.d: 1}, a: 2}"
    settings = read(tmp_path, text)
    assert settings.env == {"A.b": "x"}
    assert settings.arguments == {"A.b": {"C.d": 1}, "a": 2}
    env = {
        "TANDEM__TRAINER__ENV__VLLM_Level": "1",
        "TANDEM__TRAINER__ENV__A__B.c": "2",
        "TANDEM__TRAINER__ARGUMENTS__Some.Key": "3",
        "TANDEM__TRAINER__ARGUMENTS__X__Y": "4",
    }
    settings = read_file(tmp_path, "trainer: {}", env=env)
    assert settings.env == {"VLLM_Level": "1", "A__B.c": "2"}
    assert settings.arguments == {"Some.Key": 3, "X": {"Y": 4}}
    overrides = parse_overrides(["--trainer.env.A.B=1", "--trainer.arguments.X.y=2", "--trainer.arguments={Z.z: 3}"])
    settings = read_file(tmp_path, "trainer: {}", overrides=overrides)
    assert settings.env == {"A.B": "1"}
    assert settings.arguments == {"X": {"y": 2}, "Z.z": 3}


def test_a_variable_in_upper_case_matches_the_key_in_the_file(tmp_path: Path) -> None:
    env = {"TANDEM__TRAINER__ARGUMENTS__ENABLE_THINKING": "true", "TANDEM__TRAINER__ARGUMENTS__OTHER": "1"}
    settings = read_file(tmp_path, "trainer: {arguments: {enable_thinking: false}}", env=env)
    assert settings.arguments == {"enable_thinking": True, "OTHER": 1}


# -- sections and documents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "trainer:\n",
        "trainer: {}\n",
        "trainer: null\n",
        "trainer:\n  optim:\n  arguments:\n  env: ~\n  eval:\n  limit:\n",
    ],
)
def test_an_empty_section_has_its_defaults(tmp_path: Path, text: str) -> None:
    assert read_file(tmp_path, text) == Trainer()
    env = {"TANDEM__TRAINER__OPTIM__LEARNING_RATE": "3e-5"}
    assert read_file(tmp_path, text, env=env).optim.learning_rate == 3e-5


def test_dotted_keys_are_paths_through_sections(tmp_path: Path) -> None:
    settings = read_file(tmp_path, "trainer.max_steps: 5\ntrainer: {optim.learning_rate: 1e-3}\n")
    assert (settings.max_steps, settings.optim.learning_rate) == (5, 1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer:\n\tmax_steps: 1\n",
            "line 2, column 1: this is not YAML: a tab is not allowed as indentation. Fix: use spaces",
        ),
        ("trainer: {}\n---\nshared: {}\n", "line 2, column 1: .*second document"),
        ("trainer: &a\n  b: *a\n", "line 1: this alias is inside its own anchor"),
        ("trainer: *absent\n", "line 1, column 10: this is not YAML: found undefined alias"),
        ("trainer: [1\n", "line 2, column 1: this is not YAML"),
        ("trainer: !env X\n", "line 1: got the tag !env before 'X'"),
        ("trainer: !!python/object:os.system {}\n", "line 1: got the tag"),
        ("trainer:\n  ? [a]\n  : 1\n", "line 2: got a key that is a list or a mapping"),
        ("- trainer\n", "contains a list; expected a mapping with the sections"),
        ("", "contains nothing; expected a mapping"),
        ("trainer\n", "contains trainer; expected a mapping"),
        ("trainer: 5\n", r"trainer: got 5 \(from .*line 1\); .*dictionary"),
        ("trainer: {max_steps: {a: 1}}\n", r"trainer\.max_steps: got {'a': 1}"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_a_document_that_cannot_be_read_is_reported_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_file(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_byte_order_marks_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes("trainer:\r\n  run_name: größe\r\n".encode(encoding))
        assert load(Settings, path=path, env={})[0].trainer.run_name == "größe"


def test_a_value_that_is_not_a_list_is_refused_for_a_list(tmp_path: Path) -> None:
    assert "trainer.names: got 'a'" in refusal(tmp_path, "names: a")


# -- environment and command line -------------------------------------------------------------------------------------


@pytest.fixture(params=["environment", "command line"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Return a function that sets a key of the section `trainer` to words of a shell."""

    def give(key: str, words: str) -> Trainer:
        if request.param == "environment":
            name = f"TANDEM__TRAINER__{key.replace('.', '__')}"
            return read_file(tmp_path, "trainer: {}", env={name: words})
        return read_file(tmp_path, "trainer: {}", overrides=parse_overrides([f"--trainer.{key}", words]))

    return give


@pytest.mark.parametrize(
    "word", [w for w in AMBIGUOUS_WORDS if w not in ("null", "~")] + ["a b", "# a", "a: b", "@x", "[a", "*"]
)
def test_a_key_for_text_accepts_words_without_quotes(given: Any, word: str) -> None:
    assert given("run_name", word).run_name == word
    assert given("run_name", f'"{word}"').run_name == word
    assert given("run_name", f"'{word}'").run_name == word
    assert given("env.A", word).env == {"A": word}


@pytest.mark.parametrize(
    ("key", "words", "value"),
    [
        ("max_steps", "5", 5),
        ("max_steps", '"5"', 5),
        ("limit", "null", None),
        ("limit", "", None),
        ("temperature", "1e-5", 1e-5),
        ("shuffle", "no", False),
        ("names", "[a, 007, on]", ("a", "007", "on")),
        ("names", '["a", "b c"]', ("a", "b c")),
        ("arguments", "{a: 1e-5, b: [x]}", {"a": 1e-5, "b": ["x"]}),
        ("arguments.a", '"no"', {"a": "no"}),
        ("optim", "{learning_rate: 1e-5}", Optim(learning_rate=1e-5)),
        ("rewards", "[{function: f, weight: .5}]", (Reward(function="f", weight=0.5),)),
    ],
)
def test_other_keys_are_read_as_yaml(given: Any, key: str, words: str, value: object) -> None:
    assert getattr(given(key, words), key.split(".")[0]) == value


@pytest.mark.parametrize(
    ("key", "words"), [("arguments.a", "on"), ("max_steps", "007"), ("arguments", "{a: 2026-11-25}")]
)
def test_the_fix_shows_how_to_quote_for_a_shell(given: Any, key: str, words: str) -> None:
    word = words.strip("{}a: ")
    with pytest.raises(ConfigError, match=f"""quote text, also for the shell: '"{word}"'"""):
        given(key, words)


@pytest.mark.parametrize("words", ["[", "{a: ", '"a', "{a: 1, a: 2}"])
def test_words_that_are_not_yaml_are_refused_with_their_key(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=r"(?i)trainer(__|.)arguments"):
        given("arguments", words)


def test_infinity_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Optim(learning_rate=math.inf)
