"""What the generator sets in the environment before vLLM and torch are imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tandem_generator.vllm_logging import CONFIG_PATH, TORCH_LOGS, configure_vllm_logging


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CONFIG_PATH, TORCH_LOGS):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def test_vllm_and_torch_are_told_what_to_log() -> None:
    configure_vllm_logging({})
    Path(os.environ[CONFIG_PATH]).unlink()
    assert os.environ[TORCH_LOGS] == "-torch._library.triton"


def test_the_users_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TORCH_LOGS, "+dynamo")
    configure_vllm_logging({CONFIG_PATH: "mine.json"})
    assert (os.environ[TORCH_LOGS], CONFIG_PATH in os.environ) == ("+dynamo", False)
    monkeypatch.delenv(TORCH_LOGS)
    configure_vllm_logging({CONFIG_PATH: "mine.json", TORCH_LOGS: "+inductor"})
    assert TORCH_LOGS not in os.environ
