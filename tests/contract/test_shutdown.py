"""`POST /shutdown` ends a generator: what runs may finish, and the exit status is 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.generators import Generator
from support.models import make_tiny_model
from tandem_protocol.messages import Prompt


@pytest.mark.parametrize("engine", ["mock", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_a_generator_that_is_asked_to_end_answers_and_ends_with_status_0(tmp_path: Path, engine: str) -> None:
    model = make_tiny_model(tmp_path / "model")
    generator = Generator(engine, model, tmp_path / "weights", log=tmp_path / "log")
    try:
        generator.wait_ready().rollouts(Prompt(token_ids=(5,)), max_tokens=2)
        response = generator.client.post("/shutdown")
        assert (response.status_code, response.json()) == (202, {"status": "ending"})
        assert generator.process.wait(60) == 0, generator.log.read_text()
    finally:
        generator.process.kill()
