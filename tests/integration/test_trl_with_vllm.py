"""An unmodified TRL script with the real vLLM engine: it samples from the trained weights, also after a crash."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from support import trl
from support.generators import free_port, running
from support.models import make_tiny_model
from support.served import wait_until
from tandem_protocol.version import Version

pytestmark = [pytest.mark.trl, pytest.mark.vllm]
STEPS = 3


def test_each_step_is_sampled_from_the_trained_weights_although_the_generator_is_killed_twice(tmp_path: Path):
    model = make_tiny_model(tmp_path / "model", initializer_range=0.3, max_position_embeddings=2048)
    weights, log, greedy = tmp_path / "weights", tmp_path / "generator.log", tmp_path / "greedy.jsonl"
    with ExitStack() as stack:
        start = partial(running, "vllm", model, weights, log=log, port=free_port())
        first = stack.enter_context(start())
        given = ["--model", str(model), "--out", str(tmp_path / "out"), "--port", str(first.port)]
        given += ["--steps", str(STEPS), "--greedy", str(greedy), "--wait-for-death", "0", "--length", "200"]
        script, spans = trl.start_recorded(trl.NEWEST, weights, tmp_path / "spans.jsonl", *given)
        stack.enter_context(trl.ended(script))
        wait_until(lambda: greedy.exists() and bool(greedy.read_text()), timeout_s=180)
        first.kill()  # between two steps
        second = stack.enter_context(start())
        wait_until(lambda: second.served.version == Version(1, 1) and second.is_sampling, timeout_s=180)
        second.kill()  # in the middle of a step
        third = stack.enter_context(start())
        status, output = trl.finish(script)
        assert status == 0, output
        assert third.served.version == Version(STEPS, 1)
    lines = [json.loads(line) for line in greedy.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["server"] for line in lines] == [line["model"] for line in lines]
    assert all(before["model"] != after["model"] for before, after in pairwise(lines)), "a skipped update would be seen"
    assert [(line["step"], line["versions"]) for line in spans()] == [(step, [f"{step}.1"]) for step in range(STEPS)]
