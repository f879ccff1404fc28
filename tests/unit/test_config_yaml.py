"""YAML, environment and command line: what is written is what is read, or it is refused with the fix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest

from tandem_protocol.config import ConfigError, Section, load, parse_overrides, resolved


class Optim(Section):
    learning_rate: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.999)


class Reward(Section):
    function: str
    weight: float = 1.0
    arguments: dict[str, Any] = {}


class Trainer(Section):
    run_name: str = "default"
    max_steps: int = 1
    limit: int | None = None
    shuffle: bool = True
    temperature: float = 1.0
    output_dir: Path = Path("runs")
    mode: Literal["on", "off"] = "on"
    names: tuple[str, ...] = ()
    optim: Optim = Optim()
    eval: Optim | None = None
    rewards: tuple[Reward, ...] = ()
    arguments: dict[str, Any] = {}
    env: dict[str, str] = {}


class Settings(Section):
    trainer: Trainer = Trainer()


def read(tmp_path: Path, text: str) -> Trainer:
    """`text` as the body of the section trainer."""
    return read_file(tmp_path, "trainer:\n" + "".join(f"  {line}\n" for line in text.splitlines()))


def read_file(tmp_path: Path, text: str, **more: Any) -> Trainer:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load(Settings, path=path, **({"env": {}} | more))[0].trainer


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return str(caught.value)


# -- numbers -----------------------------------------------------------------------------------------------------


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
def test_a_number_is_read_however_it_is_written(tmp_path: Path, written: str, value: float) -> None:
    settings = read(tmp_path, f"optim: {{learning_rate: {written}, betas: [{written}]}}").optim
    assert (settings.learning_rate, settings.betas) == (value, (value,))
    assert type(settings.learning_rate) is float


@pytest.mark.parametrize(
    ("written", "value"),
    [("5", 5), ("+5", 5), ("2.0", 2), ("1e3", 1000), ("1e+06", 10**6), ("1_000", 1000), ("0x10", 16), ("0o17", 15),
     ('"5"', 5)],
)  # fmt: skip
def test_a_whole_number_is_read_however_it_is_written(tmp_path: Path, written: str, value: int) -> None:
    settings = read(tmp_path, f"max_steps: {written}\nlimit: {written}")
    assert (settings.max_steps, settings.limit) == (value, value)
    assert type(settings.max_steps) is int


@pytest.mark.parametrize(
    "written", ["true", "on", "no", "2.5", "1e-5", "1:30", "2026-11-25", "0b11", ".inf", ".nan", "nan", "[1]", "007"]
)
@pytest.mark.parametrize("key", ["max_steps", "limit"])
def test_what_is_not_a_whole_number_is_refused(tmp_path: Path, key: str, written: str) -> None:
    message = refusal(tmp_path, f"\n{key}: {written}")
    assert message.startswith(f"trainer.{key}")
    assert "config.yaml, line 3" in message


@pytest.mark.parametrize(
    "written", ["true", "yes", "1:30", "2026-11-25", ".inf", "-.inf", ".nan", "nan", "inf", "1e999", "010"]
)
def test_what_is_not_a_finite_number_is_refused(tmp_path: Path, written: str) -> None:
    message = refusal(tmp_path, f"temperature: {written}")
    assert message.startswith("trainer.temperature")
    assert "expected a" in message or "quote" in message


def test_a_number_that_two_versions_of_yaml_read_differently_says_both(tmp_path: Path) -> None:
    message = refusal(tmp_path, "max_steps: 010")
    assert "got 010 without quotes, which YAML 1.1 reads as 8 and YAML 1.2 as 10" in message
    assert "write 10 for the number" in message


# -- truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [("true", True), ("True", True), ("yes", True), ("on", True), ("y", True), ("1", True), ('"true"', True),
     ("false", False), ("FALSE", False), ("no", False), ("Off", False), ("n", False), ("0", False)],
)  # fmt: skip
def test_a_switch_is_read_however_it_is_written(tmp_path: Path, written: str, value: bool) -> None:
    assert read(tmp_path, f"shuffle: {written}").shuffle is value


@pytest.mark.parametrize("written", ["2", "maybe", "1.5", "null"])
def test_what_is_not_a_switch_is_refused(tmp_path: Path, written: str) -> None:
    assert refusal(tmp_path, f"shuffle: {written}").startswith("trainer.shuffle")


def test_a_choice_among_words_is_one_of_them(tmp_path: Path) -> None:
    assert read(tmp_path, "mode: off").mode == "off"
    assert "expected 'on' or 'off'" in refusal(tmp_path, "mode: yes")


# -- text --------------------------------------------------------------------------------------------------------

NO_TEXT = ["on", "off",
            "yes", "No", "true", "False", "007", "42", "-1", "1e5", "1.", ".5", "0x10", "0o7", "1:30", "1_000",
           "2026-11-25", "2026-11-25 10:00:00", ".inf", ".nan", "null", "~"]  # fmt: skip


@pytest.mark.parametrize("word", NO_TEXT)
@pytest.mark.parametrize(
    "text", ["run_name: {}", "output_dir: {}", "names: [a, {}]", "env: {{A: {}}}", "rewards: [{{function: {}}}]"]
)
def test_a_word_that_some_yaml_reads_otherwise_is_no_text_until_it_is_quoted(
    tmp_path: Path, text: str, word: str
) -> None:
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
def test_other_words_are_text_as_they_are(tmp_path: Path, word: str) -> None:
    settings = read(tmp_path, f"run_name: {word}\narguments: {{a: {word}}}")
    assert (settings.run_name, settings.arguments) == (word, {"a": word})


# -- mappings that take anything -----------------------------------------------------------------------------------

FREE = [
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
def test_where_anything_goes_a_word_with_two_readings_is_refused(tmp_path: Path, text: str, word: str) -> None:
    message = refusal(tmp_path, text.format(word))
    assert f"got {word} without quotes, which YAML 1.1 reads as" in message
    assert f'quote text: "{word}"' in message
    quoted = read(tmp_path, text.format(f'"{word}"'))
    assert word in str([quoted.arguments, quoted.rewards])


def test_resolved_shows_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("trainer:\n  optim: {learning_rate: 1e-5}\n  env: {a.b: x}\n")
    rows = {row.key: (row.value, row.source) for row in resolved(*load(Settings, path=path, env={}))}
    assert rows["trainer.optim.learning_rate"] == (1e-5, str(path))
    assert rows['trainer.env."a.b"'] == ("x", str(path))


# -- keys --------------------------------------------------------------------------------------------------------


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
def test_a_key_that_stands_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, key: str, lines: tuple[int, int]
) -> None:
    with pytest.raises(ConfigError, match=f"got the key {key} on line {lines[0]} and again on line {lines[1]}"):
        read_file(tmp_path, text)


def test_a_key_in_two_spellings_is_given_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps is given twice: .*line 1, and .*line 2"):
        read_file(tmp_path, "trainer.max_steps: 1\ntrainer: {max_steps: 2}\n")
    env = {"TANDEM__TRAINER__MAX_STEPS": "1", "TANDEM__trainer__max_steps": "2"}
    with pytest.raises(ConfigError, match=r"given twice: TANDEM__TRAINER__MAX_STEPS, and TANDEM__trainer__max_steps"):
        read_file(tmp_path, "trainer: {}\n", env=env)


def test_merge_keys_override_and_anchors_stand_for_their_values(tmp_path: Path) -> None:
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
def test_a_key_that_some_yaml_reads_as_no_text_is_refused_until_it_is_quoted(
    tmp_path: Path, text: str, key: str
) -> None:
    assert f'Fix: quote it: "{key}"' in refusal(tmp_path, text.format(key))
    if text.startswith("arguments"):
        assert read(tmp_path, text.format(f'"{key}"')).arguments == {key: "x"}


def test_keys_of_mappings_keep_their_case_and_their_dots(tmp_path: Path) -> None:
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


def test_a_variable_in_capitals_is_the_key_that_the_file_has(tmp_path: Path) -> None:
    env = {"TANDEM__TRAINER__ARGUMENTS__ENABLE_THINKING": "true", "TANDEM__TRAINER__ARGUMENTS__OTHER": "1"}
    settings = read_file(tmp_path, "trainer: {arguments: {enable_thinking: false}}", env=env)
    assert settings.arguments == {"enable_thinking": True, "OTHER": 1}


# -- sections and documents ----------------------------------------------------------------------------------------


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


def test_dotted_keys_stand_for_sections(tmp_path: Path) -> None:
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
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_file(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_a_byte_order_mark_and_windows_line_ends_are_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes("trainer:\r\n  run_name: größe\r\n".encode(encoding))
        assert load(Settings, path=path, env={})[0].trainer.run_name == "größe"


def test_a_list_that_is_not_one_is_refused(tmp_path: Path) -> None:
    assert "trainer.names: got 'a'" in refusal(tmp_path, "names: a")


# -- environment and command line ----------------------------------------------------------------------------------


@pytest.fixture(params=["environment", "command line"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Gives a key of the section trainer some words."""

    def give(key: str, words: str) -> Trainer:
        if request.param == "environment":
            name = f"TANDEM__TRAINER__{key.replace('.', '__')}"
            return read_file(tmp_path, "trainer: {}", env={name: words})
        return read_file(tmp_path, "trainer: {}", overrides=parse_overrides([f"--trainer.{key}", words]))

    return give


@pytest.mark.parametrize(
    "word", [w for w in NO_TEXT if w not in ("null", "~")] + ["a b", "# a", "a: b", "@x", "[a", "*"]
)
def test_a_key_for_text_takes_words_as_the_shell_gives_them(given: Any, word: str) -> None:
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
def test_other_keys_read_yaml(given: Any, key: str, words: str, value: object) -> None:
    assert getattr(given(key, words), key.split(".")[0]) == value


@pytest.mark.parametrize(
    ("key", "words"), [("arguments.a", "on"), ("max_steps", "007"), ("arguments", "{a: 2026-11-25}")]
)
def test_a_refusal_says_how_to_quote_for_a_shell(given: Any, key: str, words: str) -> None:
    word = words.strip("{}a: ")
    with pytest.raises(ConfigError, match=f"""quote text, also for the shell: '"{word}"'"""):
        given(key, words)


@pytest.mark.parametrize("words", ["[", "{a: ", '"a', "{a: 1, a: 2}"])
def test_words_that_are_not_yaml_are_refused_with_their_key(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=r"(?i)trainer(__|.)arguments"):
        given("arguments", words)


def test_infinity_is_no_setting() -> None:
    with pytest.raises(ValueError, match="finite"):
        Optim(learning_rate=math.inf)
