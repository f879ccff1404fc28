"""A generator ends with status 0 when the file appears that says that the run is over, also while it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.generators import Generator
from support.models import make_tiny_model
from tandem_protocol.messages import Prompt

ENGINES = ["mock", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_generator_ends_with_status_0_when_the_run_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    file = tmp_path / "run-over"
    monkeypatch.setenv("TANDEM_END_FILE", str(file))
    generator = Generator(engine, make_tiny_model(tmp_path / "model"), tmp_path / "weights", log=tmp_path / "log")
    try:
        generator.wait_ready().rollouts(Prompt(token_ids=(5,)), max_tokens=2)
        file.touch()
        assert generator.process.wait(60) == 0, generator.log.read_text()
    finally:
        generator.process.kill()


def test_a_generator_does_not_start_when_the_run_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run-over"
    file.touch()
    monkeypatch.setenv("TANDEM_END_FILE", str(file))
    generator = Generator("mock", make_tiny_model(tmp_path / "model"), tmp_path / "weights", log=tmp_path / "log")
    assert generator.process.wait(60) == 0, generator.log.read_text()
