"""An unmodified TRL script with the real vLLM engine: it samples from the trained weights, also after a crash."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from support import trl
from support.generators import Generator, running
from support.models import make_tiny_model
from support.served import wait_until
from tandem_protocol.version import Version

pytestmark = [pytest.mark.trl, pytest.mark.vllm]
STEPS = 4


def test_each_step_is_sampled_from_the_trained_weights_although_the_generator_is_killed_twice(tmp_path: Path):
    model = make_tiny_model(tmp_path / "model", initializer_range=0.3, max_position_embeddings=2048)
    weights, log, greedy = tmp_path / "weights", tmp_path / "generator.log", tmp_path / "greedy.jsonl"
    first = Generator("vllm", model, weights, log=log).wait_ready()
    given = ["--model", str(model), "--out", str(tmp_path / "out"), "--port", str(first.port), "--steps", str(STEPS)]
    given += ["--greedy", str(greedy), "--wait-for-death", "1"]
    script, spans = trl.start_recorded(trl.NEWEST, weights, tmp_path / "spans.jsonl", *given)
    with trl.ended(script):
        wait_until(lambda: greedy.exists() and len(greedy.read_text().splitlines()) == 2, timeout_s=120)
        first.kill()  # between two steps
        with running("vllm", model, weights, log=log, port=first.port) as second:
            status, output = trl.finish(script)
            assert status == 0, output
            assert second.served.version == Version(STEPS, 1)
    lines = [json.loads(line) for line in greedy.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["server"] for line in lines] == [line["model"] for line in lines]
    assert all(before["model"] != after["model"] for before, after in pairwise(lines)), "a skipped update would be seen"
    assert [(line["step"], line["versions"]) for line in spans()] == [(step, [f"{step}.1"]) for step in range(STEPS)]
