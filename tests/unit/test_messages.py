"""Messages are complete and unambiguous. Inconsistent messages and unknown keys are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tandem_protocol.messages import (
    Completion,
    Group,
    Prompt,
    RolloutLine,
    RolloutRequest,
    Sampling,
    SetWeights,
    SwitchTimings,
)
from tandem_protocol.version import Version

logprobs = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False)


def completion(**changes: Any) -> dict[str, Any]:
    complete = {
        "token_ids": [5, 6, 7],
        "logprobs": [-0.5, -1.0, -1.5],
        "finish_reason": "stop",
        "versions": [{"version": "41.1", "tokens": 2}, {"version": "42.1", "tokens": 1}],
    }
    return complete | changes


@given(st.lists(st.tuples(st.integers(0, 2**20), logprobs, st.integers(0, 3)), max_size=20))
def test_a_completion_survives_the_wire_with_exact_logprobs(tokens: list[tuple[int, float, int]]) -> None:
    sent = Completion(
        token_ids=tuple(token for token, _, _ in tokens),
        logprobs=tuple(logprob for _, logprob, _ in tokens),
        finish_reason="length",
        versions=tuple({"version": Version(step, 1), "tokens": 1} for _, _, step in tokens),
    )
    line = RolloutLine(group=Group(prompt_index=0, completions=(sent,))).model_dump_json()
    assert "\n" not in line
    received = RolloutLine.model_validate_json(line).group
    assert received is not None
    assert received.completions == (sent,)


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": [-0.5, -1.0]},
        {"token_ids": [5, 6]},
        {"versions": [{"version": "41.1", "tokens": 2}]},
        {"versions": [{"version": "41.1", "tokens": 4}]},
        {"versions": []},
    ],
    ids=["logprob missing", "token missing", "span short", "span long", "no span"],
)
def test_a_completion_needs_one_logprob_and_one_version_per_token(changes: dict[str, Any]) -> None:
    Completion.model_validate(completion())
    with pytest.raises(ValidationError, match="expected one logprob and one version per token"):
        Completion.model_validate(completion(**changes))


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf")])
def test_a_logprob_that_is_not_finite_is_refused(logprob: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Completion.model_validate(completion(logprobs=[-0.5, -1.0, logprob]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop_token_ids", [-1]),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_with_its_field(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Sampling.model_validate({"max_tokens": 8, field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_the_default_sampling_has_no_filters() -> None:
    sampling = Sampling(max_tokens=8)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert sampling.repetition_penalty == 1.0


@pytest.mark.parametrize(
    "request_",
    [
        {"prompts": [], "sampling": {"max_tokens": 8}},
        {"prompts": [{"token_ids": []}], "sampling": {"max_tokens": 8}},
        {"prompts": [{"token_ids": [-1]}], "sampling": {"max_tokens": 8}},
        {"prompts": [{"token_ids": ["one"]}], "sampling": {"max_tokens": 8}},
        {"prompts": [{"token_ids": [1]}], "sampling": {"max_tokens": 8}, "min_version": "latest"},
    ],
    ids=["no prompt", "empty prompt", "negative token", "text", "min_version"],
)
def test_an_invalid_rollout_request_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RolloutRequest.model_validate(request_)


@pytest.mark.parametrize("model", [Sampling, Prompt, SetWeights, Completion])
def test_unknown_keys_are_refused(model: Any) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model.model_validate({"tempertaure": 0.7})


def test_a_message_cannot_be_changed_after_validation() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Sampling(max_tokens=8).n = 0  # type: ignore[misc]  # it is read-only


def test_the_timing_in_the_header_of_a_switch_survives_the_wire_and_may_be_missing() -> None:
    sent = SwitchTimings(visible_s=0.25, verify_s=1.0, pause_s=0.5, load_s=2.0, total_s=4.0)
    received = SwitchTimings.model_validate_json(sent.model_dump_json())
    assert received.with_header(sent.header) == sent
    assert received.with_header("").visible_s == 0.0
