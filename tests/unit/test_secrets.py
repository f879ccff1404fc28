"""Secrets are masked wherever they could be logged, printed or written."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from tandem_cli.doctor.facts import ComposeService
from tandem_cli.doctor.hub import ask_hub
from tandem_protocol import logs
from tandem_protocol.config import SharedConfig, read_token
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.secrets import is_secret, mask
from tandem_trainer.__main__ import main as trainer

SECRET = "planted-secret"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"GET http://user:{SECRET}@host:8000/info", "GET http://***@host:8000/info"),
        (f"['https://{SECRET}@a', 'http://u:pa/ss@b']", "['https://***@a', 'http://***@b']"),
        ("http://host:8000/a?b=c and me@example.com", "http://host:8000/a?b=c and me@example.com"),
        (f"token hf_{'a1B' * 11}.", "token ***."),
        ("hf_transfer", "hf_transfer"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
    ],
)
def test_secrets_are_masked_and_nothing_else(text: str, masked: str) -> None:
    assert mask(text, {"TANDEM_TOKEN": SECRET, "DB_PASSWORD": "a", "HOME": "host"}) == masked


def test_names_of_secrets_are_known_and_no_setting_looks_like_one() -> None:
    names = ["HF_TOKEN", "TANDEM_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "hf_token", "api_key"]
    assert all(map(is_secret, names))
    fields = [
        *TrainerConfig.model_fields,
        *SharedConfig.model_fields,
        "max_tokens",
        "stop_token_ids",
        "TANDEM_TOKEN_FILE",
    ]
    assert not any(map(is_secret, fields))


def test_a_token_from_a_file_is_masked(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    read_token({"TANDEM_TOKEN_FILE": str(tmp_path / "token")})
    assert mask("got from-a-file", {}) == "got ***"


@pytest.mark.parametrize("form", [logs.TEXT, logs.JSON])
def test_log_lines_fields_and_tracebacks_are_masked(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    try:
        raise ValueError(f"http://user:{SECRET}@host")
    except ValueError as error:
        caught = (type(error), error, error.__traceback__)
    record = logging.makeLogRecord({"msg": f"got {SECRET}", "exc_info": caught, logs.FIELDS: {"generator": [SECRET]}})
    line = logs.make_formatter({"TANDEM_LOG": form}).format(record)
    assert SECRET not in line
    assert "http://***@host" in line
    if form == logs.JSON:
        assert json.loads(line)["generator"] == ["***"]


MISTAKES: list[dict[str, object]] = [
    {"shared": {"generators": [f"http://user:{SECRET}@host/path"]}},
    {"shared": {"generators": [f"http://user:{SECRET}@host:port"]}},
    {"shared": {"generators": f"http://user:{SECRET}@host"}},
    {"shared": {"generators": [f"http://user:{SECRET}@{'host' * 30}"] * 9, "model": 1}},
    {"shared": {"token": SECRET}},
    {"generator": {"env": {"HF_TOKEN": [SECRET]}}},
    {"trainer": {"max_steps": f"http://user:{SECRET}@host"}},
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
@pytest.mark.parametrize("check", [[], ["--check"]], ids=["run", "check"])
def test_a_mistake_in_the_configuration_does_not_show_a_secret(
    mistake: dict[str, object], check: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"shared": {"model": "m"}} | mistake))
    trainer(["--config", str(tmp_path / "config.yaml"), *check, "--trainer.max_steps", "none"])
    written = capsys.readouterr()
    assert written.err
    assert SECRET not in written.out + written.err


def test_check_prints_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = {"model": "m", "generators": [f"http://user:{SECRET}@host:8000"]}
    trainer_section = {
        "max_steps": 1,
        "rewards": [{"function": "rewards:f"}],
        "prompts": {"source": f"https://u:{SECRET}@host/a.jsonl"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"shared": shared, "trainer": trainer_section}))
    assert trainer(["--config", str(tmp_path / "config.yaml"), "--check"]) == 0
    printed = capsys.readouterr().out
    assert "http://***@host:8000" in printed
    assert SECRET not in printed


def test_doctor_does_not_print_the_password_of_the_hub() -> None:
    hub = {"HF_ENDPOINT": f"http://user:{SECRET}@127.0.0.1:1"}
    answer = str(ask_hub("model", None, ComposeService("tandem-trainer:cpu", env=hub, mounts=())))
    assert "http://***@127.0.0.1:1" in answer
    assert SECRET not in answer
