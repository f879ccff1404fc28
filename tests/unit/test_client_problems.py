"""Unusable answers are reported in one line. Those that a retry would repeat end the run at once."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from support.fake_generators import speaking
from tandem_protocol.errors import EngineFailed, LogprobsNotFinite, TandemError
from tandem_protocol.messages import Prompt, RolloutLine, RolloutRequest, Sampling, SetWeights
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient

pytestmark = pytest.mark.usefixtures("names")

REQUEST = RolloutRequest(prompts=(Prompt(token_ids=(1,)),), sampling=Sampling(max_tokens=200))
LONGEST = 500
"""Upper bound for the length of a message in characters, so that people read it completely."""


def line(**changes: Any) -> str:
    completion = {
        "token_ids": [5] * 200,
        "logprobs": [-1.0] * 200,
        "finish_reason": "length",
        "versions": [{"version": "1.1", "tokens": 200}],
    }
    return json.dumps({"group": {"prompt_index": 0, "completions": [completion | changes]}}) + "\n"


async def ask(answer: httpx.Response) -> int:
    """Request rollouts from a generator that always returns `answer`, and return the number of requests."""
    calls = 0

    def handler(_: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return answer

    client = GeneratorClient(["http://replica0"], None, transport=speaking(handler))
    try:
        await client.rollouts(REQUEST, lambda _: None, timeout_s=0.3)
    except TandemError:
        assert calls == 1, "an error that a retry would repeat is not retried"
        raise
    return calls


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), float("-inf"), None])
@pytest.mark.parametrize("bad", [1, 200])
async def test_logprobs_that_are_not_finite_end_the_run_at_once_with_the_cause(logprob: Any, bad: int) -> None:
    answer = httpx.Response(200, text=line(logprobs=[-1.0] * (200 - bad) + [logprob] * bad))
    with pytest.raises(LogprobsNotFinite) as caught:
        await ask(answer)
    message = str(caught.value)
    assert f"got the logprob {logprob} for group.completions.0.logprobs.{200 - bad}" in message
    assert "replica0" in message
    assert "dtype" in message
    assert len(message) < LONGEST


async def test_logprobs_not_finite_from_a_generator_is_not_retried() -> None:
    error = RolloutLine(error=LogprobsNotFinite("got the logprob nan").body)
    with pytest.raises(LogprobsNotFinite, match="replica0: got the logprob nan"):
        await ask(httpx.Response(200, text=error.model_dump_json() + "\n"))


@pytest.mark.parametrize(
    "text",
    [
        line(token_ids=["x"] * 200),
        line(logprobs=["x"] * 200),
        line(logprobs=[-1.0]),
        line(finish_reason="x" * 10_000),
        "<html>" * 10_000 + "\n",
        "[" * 10_000 + "\n",
        "{}\n",
        "null\n",
    ],
    ids=["tokens", "logprobs", "length", "reason", "html", "brackets", "empty", "null"],
)
async def test_a_line_that_cannot_be_read_is_reported_without_its_numbers(text: str) -> None:
    with pytest.raises(TimeoutError) as caught:
        await ask(httpx.Response(200, text=text))
    assert "EngineFailed: a line of the answer" in str(caught.value)
    assert len(str(caught.value)) < LONGEST


@pytest.mark.parametrize("body", ["<html>busy</html>", "{}", '{"served": true}', "x" * 10_000])
async def test_the_answer_of_another_server_is_reported_in_one_line(body: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=body))
    client = GeneratorClient(["http://replica0"], None, transport=transport)
    with pytest.raises(TandemError, match="GET /info returned a body that this release cannot read") as caught:
        await client.info(timeout_s=1)
    assert len(str(caught.value)) < LONGEST
    with pytest.raises(TandemError, match=r"PUT /weights/1\.1 returned a body that this release cannot read"):
        await client.set_weights(Version(1, 1), SetWeights(manifest_digest="x"), timeout_s=1)


async def test_wait_ready_retries_after_a_503_from_a_proxy() -> None:
    answers = iter([httpx.Response(503, text="<html>no upstream</html>"), httpx.Response(200)])
    client = GeneratorClient(["http://replica0"], None, transport=httpx.MockTransport(lambda _: next(answers)))
    await client.wait_ready(timeout_s=5)


def test_the_validation_error_of_a_message_does_not_print_the_value() -> None:
    with pytest.raises(ValueError, match="logprobs") as caught:
        RolloutLine.model_validate_json(line(logprobs=["secret"] * 200))
    assert "secret" not in str(caught.value)


def test_logprobs_not_finite_is_not_retryable() -> None:
    assert not LogprobsNotFinite.retryable
    assert EngineFailed.retryable


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (httpx.ReadError(""), "ReadError: the connection broke"),
        (httpx.ReadTimeout(""), "ReadTimeout: no answer in time"),
        (httpx.ConnectError("refused"), "ConnectError: refused"),
    ],
)
async def test_an_error_of_the_network_without_a_text_is_described(error: httpx.TransportError, reason: str) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    client = GeneratorClient(["http://replica0"], None, transport=httpx.MockTransport(fail))
    with pytest.raises(TimeoutError, match=reason):
        await client.rollouts(REQUEST, lambda _: None, timeout_s=0.3)
    await client.close()
