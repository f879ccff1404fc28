"""The trainer's command line, and the check of the generators at the start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem_protocol.config import ConfigError
from tandem_protocol.messages import Info, ModelFingerprint
from tandem_protocol.version import BASE
from tandem_rollout.errors import UserError
from tandem_rollout.handshake import check_generators
from tandem_trainer.__main__ import main, parse

YAML = """
shared: {model: somewhere}
trainer: {max_steps: 3, rewards: [{function: "rewards:r"}]}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return str(path)


def test_overrides_accept_a_space_or_an_equals_sign_and_are_not_converted():
    _, check, overrides = parse(
        ["--config", "c.yaml", "--trainer.max_steps", "5", "--trainer.optim.learning_rate=1.0e-3", "--check"]
    )
    assert check
    assert overrides == {"trainer.max_steps": "5", "trainer.optim.learning_rate": "1.0e-3"}


@pytest.mark.parametrize("word", ["max_steps", "--max_steps", "--trainer.max_steps"])
def test_invalid_arguments_are_refused(word: str):
    with pytest.raises(ConfigError, match="max_steps"):
        parse(["--config", "c.yaml", word])


def test_check_prints_every_value_with_its_source(config: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--config", config, "--check", "--trainer.seed=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["trainer.seed", "7", "#", "command", "line"] for line in lines)
    assert any(line.startswith("trainer.max_steps") and line.endswith(f"3  # {config}") for line in lines)
    assert any(line.split() == ["trainer.max_lag", "1", "#", "default"] for line in lines)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--trainer.max_stesp=3", "did you mean 'trainer.max_steps'"),
        ("--trainer.max_steps=0", "trainer.max_steps: got 0"),
        ("--trainer.rollout.num_generations=1", "expected 2 or more"),
    ],
)
def test_an_invalid_setting_exits_2_without_a_traceback(
    config: str, capsys: pytest.CaptureFixture[str], override: str, words: str
):
    assert main(["--config", config, override]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


OURS = ModelFingerprint(config="c", tokenizer="t", parameters="p")
INFO = Info(
    generator_id="g",
    engine="mock",
    engine_version="1",
    model="m",
    fingerprint=OURS,
    version=BASE,
    devices=("cpu:0", "cpu:1"),
    world_size=1,
    max_model_len=32,
    max_num_seqs=1,
)


def _check(*, accelerators: Sequence[str] = (), **changes: object) -> int:
    infos = [INFO, INFO.model_copy(update={"generator_id": "h", "max_model_len": 24} | changes)]
    return check_generators(
        infos, ["http://a", "http://b"], ours=OURS, model="m", max_completion_length=16, accelerators=accelerators
    )


def test_matching_generators_return_the_shortest_of_their_lengths():
    assert _check() == 24
    assert _check(fingerprint=ModelFingerprint(parameters="p")) == 24


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": 3}, "speaks protocol 3, expected 1 to 2"),
        ({"fingerprint": ModelFingerprint(config="x", tokenizer="t", parameters="q")}, "differ in config, parameters"),
        ({"max_model_len": 16}, "supports 16 tokens"),
        ({"generator_id": "g"}, "expected a different name for each"),
    ],
)
def test_a_generator_that_does_not_match_is_named(changes: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        _check(**changes)


def test_a_generator_with_another_model_is_named_with_the_parameters_that_differ():
    with pytest.raises(UserError, match="differ in parameters; 2 parameters differ: head: trainer none") as error:
        check_generators(
            [INFO.model_copy(update={"fingerprint": ModelFingerprint(parameters="q")})],
            ["http://a"],
            ours=OURS,
            model="m",
            max_completion_length=16,
            accelerators=(),
            shapes={"embed": (8, 4), "norm": (4,)},
            tables={"http://a": {"embed": (8, 4), "head": (8, 4)}},
        )
    assert "head: trainer none, generator (8, 4); norm: trainer (4,), generator none. Fix" in str(error.value)


def test_a_generator_that_uses_a_gpu_of_any_rank_is_refused_with_both_lists():
    assert _check(devices=("GPU-a", "GPU-b"), accelerators=("GPU-c", "GPU-d")) == 24
    words = "generator h at http://b computes on GPU-a, GPU-B and the trainer on GPU-c, GPU-b. Both use GPU-b, expected"
    with pytest.raises(UserError, match=words):
        _check(devices=("GPU-a", "GPU-B"), accelerators=("GPU-c", "GPU-b"))


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_configured_for_accelerate_launch_is_refused_with_the_key_to_use(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv(name, "true")
    monkeypatch.chdir(Path(config).parent)  # the trainer changes it
    assert main(["--config", config]) == 2
    assert "set trainer.learner.parallelism: fsdp2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--config"], ["--config", "c.yaml", "--check", "--check-project"]])
def test_wrong_arguments_are_one_line_of_the_log(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"\S+ \S+ ERROR    .*--c.*Fix: `python -m tandem_trainer --help` lists the arguments", line)
