"""Each value comes from the last source that sets it. The error for a mistake names the key and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from tandem_protocol.config import ConfigError, Section, SharedConfig, load, parse_overrides, read_token, resolved


class Optim(Section):
    learning_rate: float = Field(1e-6, gt=0.0)
    betas: tuple[float, ...] = (0.9, 0.999)


class Eval(Section):
    every_steps: int = 1


class Trainer(Section):
    max_steps: int = 1
    optim: Optim = Optim()
    extra: dict[str, Any] = {}
    eval: Eval | None = None

    @model_validator(mode="after")
    def _odd(self) -> Trainer:
        if self.max_steps == 13:
            raise ValueError("max_steps is 13, expected another number")
        return self


class Settings(Section):
    shared: SharedConfig
    trainer: Trainer


def write(directory: Path, trainer: dict[str, Any], **sections: Any) -> Path:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({"shared": {"model": "m"}, "trainer": trainer} | sections))
    return path


def sources_of(settings: Settings, sources: dict[str, str]) -> dict[str, tuple[Any, str]]:
    return {row.key: (row.value, row.source) for row in resolved(settings, sources)}


@given(st.sets(st.sampled_from(["default of the caller", "yaml", "environment", "command line"])))
def test_the_last_source_that_sets_a_key_wins_and_is_reported(
    tmp_path_factory: pytest.TempPathFactory, named: set[str]
) -> None:
    path = write(tmp_path_factory.mktemp("project"), {"max_steps": 3} if "yaml" in named else {})
    settings, sources = load(
        Settings,
        path=path,
        defaults={"trainer.max_steps": 2} if "default of the caller" in named else None,
        env={"TANDEM__TRAINER__MAX_STEPS": "4"} if "environment" in named else {},
        overrides={"trainer.max_steps": 5} if "command line" in named else None,
    )
    order = [("default", 1), ("default of the caller", 2), ("yaml", 3), ("environment", 4), ("command line", 5)]
    source, value = [row for row in order if row[0] in named | {"default"}][-1]
    expected = (value, str(path) if source == "yaml" else source)
    assert sources_of(settings, sources)["trainer.max_steps"] == expected
    assert settings.trainer.max_steps == value


def test_a_source_changes_single_keys_of_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, {"optim": {"betas": [0.8, 0.9]}, "extra": {"a": 1, "b": 2}})
    env = {"TANDEM__TRAINER__OPTIM__LEARNING_RATE": "1.0e-4", "TANDEM__TRAINER__EXTRA__B": "[3, null]"}
    settings, sources = load(Settings, path=path, env=env, overrides={"trainer.extra": {"c": 4}})
    assert settings.trainer.optim == Optim(learning_rate=1e-4, betas=(0.8, 0.9))
    assert settings.trainer.extra == {"a": 1, "b": [3, None], "c": 4}
    values = sources_of(settings, sources)
    assert values["trainer.optim.learning_rate"] == (1e-4, "environment")
    assert values["trainer.optim.betas"] == ([0.8, 0.9], str(path))
    assert values["trainer.extra.c"] == (4, "command line")


def test_a_later_source_can_remove_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, {"eval": {"every_steps": 2}})
    settings, sources = load(Settings, path=path, env={}, overrides={"trainer.eval": None})
    assert settings.trainer.eval is None
    assert sources_of(settings, sources)["trainer.eval"] == (None, "command line")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trainer.max_step", "trainer.max_steps"),
        ("trainer.learning_rate", "trainer.optim.learning_rate"),
        ("trainr.max_steps", "trainer.max_steps"),
        ("shared.modle", "shared.model"),
        ("trainer.optim.beta", "trainer.optim.betas"),
    ],
)
def test_an_unknown_key_is_reported_with_its_source_and_a_suggestion(tmp_path: Path, key: str, meant: str) -> None:
    path = write(tmp_path, {})
    with pytest.raises(ConfigError, match=rf"{key}.*command line.*did you mean '{meant}'"):
        load(Settings, path=path, env={}, overrides={key: 1})


def test_an_unknown_key_that_resembles_none_is_reported_with_the_keys_of_its_section(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'trainer\.optim\.path'.*the keys of trainer\.optim are betas, learning_rate$"
    ):
        load(Settings, path=write(tmp_path, {}), env={}, overrides={"trainer.optim.path": 1})


def test_the_section_of_the_other_service_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, {}, generator={"engine": "mock"})
    assert load(Settings, path=path, env={"TANDEM__GENERATOR__PORT": "1"})[0].trainer == Trainer()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainer.max_steps": "many"}, r"trainer\.max_steps: got 'many' \(from command line\); .*integer"),
        ({"trainer.optim.learning_rate": -1}, r"trainer\.optim\.learning_rate: got -1 .*greater than 0"),
        ({"trainer.optim": 3}, r"trainer\.optim: got 3 \(from command line\)"),
        ({"trainer.max_steps": 13}, r"^trainer \(from .*\): max_steps is 13, expected another number$"),
        ({"trainer.optim.betas": ["x"]}, r"trainer\.optim\.betas\.0: got 'x' \(from command line\)"),
    ],
)
def test_an_invalid_value_is_reported_with_its_key_source_and_the_expected_value(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, {})
    with pytest.raises(ConfigError, match=message):
        load(Settings, path=path, env={}, overrides=overrides)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {"max_steps": "many", "optim": {"learning_rate": 0}})
    with pytest.raises(ConfigError) as caught:
        load(Settings, path=path, env={})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "trainer.max_steps",
        "trainer.optim.learning_rate",
    ]


def test_a_missing_value_is_reported_with_both_places_to_set_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("trainer: {}")
    with pytest.raises(ConfigError, match=r"shared\.model is missing.*config\.yaml.*TANDEM__SHARED__MODEL"):
        load(Settings, path=path, env={})


@pytest.mark.parametrize("content", ["- a", "just words", "", "a: [", "\tx: 1"])
def test_a_file_that_is_not_a_mapping_is_a_config_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(Settings, path=path, env={})


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read"):
        load(Settings, path=tmp_path / "absent.yaml", env={})


def test_an_environment_variable_that_is_not_yaml_is_named() -> None:
    with pytest.raises(ConfigError, match=r"TANDEM__TRAINER__MAX_STEPS: got '\['"):
        load(Settings, env={"TANDEM__TRAINER__MAX_STEPS": "["})


def test_overrides_are_read_as_yaml_with_a_space_or_an_equals_sign() -> None:
    arguments = ["--trainer.max_steps", "5", "--trainer.optim.betas=[0.5, 0.6]", "--shared.revision=null"]
    arguments += ["--shared.model=m"]
    settings, _ = load(Settings, env={}, overrides=parse_overrides(arguments))
    assert settings.trainer.max_steps == 5
    assert settings.trainer.optim.betas == (0.5, 0.6)
    assert settings.shared.revision is None


@pytest.mark.parametrize("arguments", [["--max_steps=5"], ["trainer.max_steps=5"], ["--trainer=5"], ["--trainer.x"]])
def test_an_invalid_override_is_refused_with_the_expected_form(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_overrides(arguments)


def test_the_token_file_takes_precedence_over_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert read_token({}) is None
    assert read_token({"TANDEM_TOKEN": "from-env"}) == "from-env"
    assert read_token({"TANDEM_TOKEN": "from-env", "TANDEM_TOKEN_FILE": str(file)}) == "from-file"


@pytest.mark.parametrize("token", ["", "  ", "two words", "tab\tbed", "schlüssel"])
def test_an_unusable_token_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ConfigError, match="no usable token") as caught:
        read_token({"TANDEM_TOKEN": token})
    assert not token.strip() or token not in str(caught.value)


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TANDEM_TOKEN_FILE=.*absent"):
        read_token({"TANDEM_TOKEN_FILE": str(tmp_path / "absent")})


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "http://host:port", "ftp://host", "http://host/v1"])
def test_a_generator_that_is_not_a_base_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"shared\.generators"):
        load(Shared, overrides={"shared.model": "m", "shared.generators": [url]}, env={})


def test_an_empty_list_of_generators_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shared\.generators"):
        load(Shared, overrides={"shared.model": "m", "shared.generators": []}, env={})


def test_a_base_url_may_end_in_a_slash() -> None:
    settings, _ = load(Shared, overrides={"shared.model": "m", "shared.generators": ["http://host:1/"]}, env={})
    assert settings.shared.generators == ("http://host:1",)


class Shared(Section):
    shared: SharedConfig
