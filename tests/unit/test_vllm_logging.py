"""What the generator sets in the environment before vLLM and torch are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem_generator.vllm_logging import (
    CONFIG_PATH,
    FAILURE_PATH,
    TORCH_LOGS,
    configure_vllm_logging,
    first_failure,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CONFIG_PATH, FAILURE_PATH, TORCH_LOGS):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def test_vllm_and_torch_are_told_what_to_log() -> None:
    configure_vllm_logging({})
    Path(os.environ[CONFIG_PATH]).unlink()
    assert os.environ[TORCH_LOGS] == "-torch._library.triton"


def test_the_first_exception_of_the_engine_is_kept_for_the_servers_message(tmp_path: Path) -> None:
    configure_vllm_logging({})
    config = Path(os.environ[CONFIG_PATH])
    assert first_failure() is None
    program = """
import json, logging.config, os, sys
logging.config.dictConfig(json.load(open(sys.argv[1])))
for message, said in (
    ("no such module", "Failed to load plugin x"),
    ("got 1 GiB,\\nexpected 2", "WorkerProc failed to start."),
    ("the worker ended", "EngineCore failed to start."),
):
    try:
        raise ValueError(message)
    except ValueError:
        logging.getLogger("vllm.v1.engine.core").exception(said)
"""
    subprocess.run([sys.executable, "-c", program, config], check=True, capture_output=True)
    assert first_failure() == "got 1 GiB, expected 2"
    Path(os.environ[FAILURE_PATH]).unlink()
    config.unlink()


def test_the_users_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TORCH_LOGS, "+dynamo")
    configure_vllm_logging({CONFIG_PATH: "mine.json"})
    assert (os.environ[TORCH_LOGS], CONFIG_PATH in os.environ) == ("+dynamo", False)
    monkeypatch.delenv(TORCH_LOGS)
    configure_vllm_logging({CONFIG_PATH: "mine.json", TORCH_LOGS: "+inductor"})
    assert TORCH_LOGS not in os.environ
