"""The wire contract over HTTP, with the mock and with vLLM: information, rollouts and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.generators import TOKEN
from support.served import MAX_MODEL_LEN, PROMPTS, VOCAB, Served, wait_until
from tandem_protocol import routes
from tandem_protocol.errors import ErrorBody
from tandem_protocol.fingerprint import fingerprint
from tandem_protocol.manifest import parameters_digest
from tandem_protocol.messages import (
    Completion,
    Info,
    Parameters,
    Readiness,
    RolloutLine,
)

# -- information and access ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_token_is_accepted_whatever_the_case_of_the_scheme(served: Served, scheme: str) -> None:
    assert served.client.get("/weights", headers={"Authorization": f"{scheme} {TOKEN}"}).status_code == 200


def test_the_openapi_document_describes_every_route(served: Served) -> None:
    paths = served.client.get("/openapi.json").json()["paths"]
    ours = {value for name, value in vars(routes).items() if name.isupper() and isinstance(value, str)}
    assert ours - {routes.METRICS} <= paths.keys()
    assert served.client.get("/docs").status_code == 200


def test_info_has_the_fingerprint_and_the_facts_of_the_generator(served: Served) -> None:
    info = Info.model_validate(served.client.get("/info").json())
    ours = fingerprint(served.policy.model_dir)
    assert (info.fingerprint.config, info.fingerprint.tokenizer) == (ours.config, ours.tokenizer)
    assert info.fingerprint.parameters is not None
    assert info.version == served.generator.served.version
    assert (info.generator_id, info.model) == ("replica-0", str(served.policy.model_dir))
    assert (info.max_model_len, info.world_size) == (MAX_MODEL_LEN, 1)
    assert all(device.startswith("cpu:") for device in info.devices)


def test_parameters_match_the_fingerprint_and_the_trainers_model(served: Served) -> None:
    parameters = Parameters.model_validate(served.client.get("/parameters").json())
    assert parameters.shapes == {name: tuple(tensor.shape) for name, tensor in served.policy.tensors().items()}
    info = Info.model_validate(served.client.get("/info").json())
    assert parameters_digest(parameters.shapes) == info.fingerprint.parameters


def test_health_and_readiness_need_no_token(served: Served) -> None:
    anonymous = {"Authorization": ""}
    assert served.client.get("/healthz", headers=anonymous).json() == {"status": "alive"}
    readiness = served.client.get("/readyz", headers=anonymous)
    assert readiness.status_code == 200
    serving = f"serving version {served.generator.served.version}"
    assert Readiness.model_validate(readiness.json()) == Readiness(ready=True, reason=serving)


GUARDED = [
    ("GET", "/info"),
    ("GET", "/parameters"),
    ("GET", "/metrics"),
    ("GET", "/weights"),
    ("PUT", "/weights/1.1"),
    ("POST", "/rollouts"),
    ("GET", "/v1/models"),
    ("GET", "/openapi.json"),
]


@pytest.mark.parametrize("header", ["", "Bearer wrong", "a-token-for-tests"], ids=["none", "wrong", "no scheme"])
@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_every_other_route_requires_the_token(served: Served, method: str, path: str, header: str) -> None:
    response = served.client.request(method, path, headers={"Authorization": header})
    assert response.status_code == 401
    error = ErrorBody.model_validate(response.json())
    assert (error.code, error.retryable) == ("unauthorized", False)
    assert error.message.startswith("got another token" if header else "got no token")
    assert "TANDEM_TOKEN" in error.message


def test_metrics_count_completions_and_tokens_and_report_the_version(served: Served) -> None:
    version = served.switch()
    before = served.metrics()
    served.generator.rollouts(*PROMPTS, n=2, max_tokens=5, ignore_eos=True)
    after = served.metrics()
    assert after["tandem_rollout_completions_total"] - before["tandem_rollout_completions_total"] == 6
    assert after["tandem_rollout_tokens_total"] - before["tandem_rollout_tokens_total"] == 30
    assert (after["tandem_weight_step"], after["tandem_weight_attempt"]) == (version.step, version.attempt)
    assert (after["tandem_ready"], after["tandem_requests_running"]) == (1, 0)


# -- rollouts ------------------------------------------------------------------------------------------------------


def test_each_prompt_gets_one_line_with_all_its_completions(served: Served) -> None:
    body = {"prompts": [p.model_dump(mode="json") for p in PROMPTS], "sampling": {"n": 4, "max_tokens": 30}}
    with served.client.stream("POST", "/rollouts", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = [RolloutLine.model_validate_json(line) for line in response.iter_lines()]
    groups = [line.group for line in lines if line.group]
    assert len(groups) == len(lines)
    assert sorted(group.prompt_index for group in groups) == [0, 1, 2]
    for completion in [completion for group in groups for completion in group.completions]:
        assert all(logprob <= 0 for logprob in completion.logprobs)
        assert [span.version for span in completion.versions] == [served.generator.served.version]
        stopped = completion.token_ids[-1] == served.policy.model.config.eos_token_id
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert len(completion.token_ids) == 30 or stopped
    assert [len(group.completions) for group in groups] == [4, 4, 4]


def test_a_completion_ends_with_a_stop_token_or_at_max_tokens(served: Served) -> None:
    tokens = served.greedy()
    stop = tokens[10]
    completion = one(served, temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    assert completion.finish_reason == "stop"
    assert one(served, temperature=0.0, max_tokens=20, ignore_eos=True).finish_reason == "length"


def test_logprobs_include_the_effect_of_sampling_filters(served: Served) -> None:
    completion = one(served, top_k=1, max_tokens=20, ignore_eos=True)
    assert completion.token_ids == served.greedy()
    assert completion.logprobs == pytest.approx([0.0] * 20, abs=1e-6)


def test_a_disconnected_client_frees_the_engine(served: Served) -> None:
    before = served.metrics()["tandem_rollout_completions_total"]
    sampling = {"n": 8, "max_tokens": 2000, "ignore_eos": True}
    body = {"prompts": [{"token_ids": [5]}] * 8, "sampling": sampling}
    with served.client.stream("POST", "/rollouts", json=body):
        wait_until(lambda: served.runs(64))
    wait_until(lambda: served.metrics()["tandem_requests_running"] == 0)
    assert served.metrics()["tandem_rollout_completions_total"] == before
    assert one(served, max_tokens=1).finish_reason


def one(served: Served, **sampling: Any) -> Completion:
    (group,) = served.generator.rollouts(PROMPTS[0], **sampling)
    return group.completions[0]


# -- bad requests --------------------------------------------------------------------------------------------------

PROMPT = {"token_ids": [5]}
BAD: dict[str, tuple[str, str, bytes | dict[str, Any], int, str, str]] = {
    "no JSON": ("POST", "/rollouts", b"{", 422, "bad_request", "the body is not JSON: Expecting property name"),
    "no text": ("POST", "/rollouts", b"\xff\xfe\xfd", 422, "bad_request", "expected JSON"),
    "unknown key": (
        "POST", "/rollouts", {"prompts": [PROMPT], "sampling": {"max_tokens": 1, "temprature": 1}}, 422,
        "bad_request", "body.sampling.temprature: got 1; Extra inputs are not permitted",
    ),
    "no prompts": (
        "POST", "/rollouts", {"prompts": [], "sampling": {"max_tokens": 1}}, 422,
        "bad_request", "body.prompts: got []; ",
    ),
    "too long": (
        "POST", "/rollouts", {"prompts": [PROMPT], "sampling": {"max_tokens": MAX_MODEL_LEN}}, 422,
        "bad_request", f"max_tokens {MAX_MODEL_LEN}, expected at most {MAX_MODEL_LEN} together",
    ),
    "no such token": (
        "POST", "/rollouts", {"prompts": [{"token_ids": [5, VOCAB]}], "sampling": {"max_tokens": 1}}, 422,
        "bad_request", f"got token id {VOCAB}, expected ids below the vocabulary's size {VOCAB}",
    ),
    "no such stop token": (
        "POST", "/rollouts", {"prompts": [PROMPT], "sampling": {"max_tokens": 1, "stop_token_ids": [VOCAB]}}, 422,
        "bad_request", f"got token id {VOCAB}, expected ids below the vocabulary's size {VOCAB}",
    ),
    "no such seed": (
        "POST", "/rollouts", {"prompts": [PROMPT | {"seed": 2**62}], "sampling": {"max_tokens": 1}}, 422,
        "bad_request", f"body.prompts.0.seed: got {2**62}; expected a number less than {2**62}",
    ),
    "min_version": (
        "POST", "/rollouts", {"prompts": [PROMPT], "sampling": {"max_tokens": 1}, "min_version": "9999.1"}, 409,
        "stale_policy", "got min_version 9999.1; this generator serves ",
    ),
    "no version": (
        "PUT", "/weights/42", {"manifest_digest": "0"}, 422,
        "bad_request", "got version '42', expected step.attempt, such as 42.1",
    ),
    "no digest": ("PUT", "/weights/42.1", {}, 422, "bad_request", "body.manifest_digest"),
    "no such mode": (
        "PUT", "/weights/42.1", {"manifest_digest": "0", "mode": "now"}, 422, "bad_request", "'drain', 'in_flight'",
    ),
    "never published": (
        "PUT", "/weights/9999.1", {"manifest_digest": "0"}, 504, "weights_not_visible", "got no version 9999.1",
    ),
}  # fmt: skip
"""Method, path and body of a bad request, and the expected status, error code and part of the message."""


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_a_bad_request_gets_an_error_with_actual_and_expected_value(
    served: Served, case: tuple[str, str, bytes | dict[str, Any], int, str, str]
) -> None:
    method, path, body, status, code, words = case
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = served.client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    error = ErrorBody.model_validate(response.json())
    assert error.code == code
    assert words in error.message
    assert served.client.get("/readyz").status_code == 200
