"""What version 2 of the wire contract added, with the mock and with vLLM. Requests of version 1 get what they got."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from typing import Any

import pytest

from support.served import PROMPTS, Served, wait_until
from tandem_protocol.errors import ErrorBody
from tandem_protocol.messages import Group, Info, Progress, RolloutLine, ServedWeights, SwitchMode
from tandem_protocol.version import Version

HEARTBEAT_S = 0.1
LONG = {"max_tokens": 600, "ignore_eos": True}
"""Decodes for longer than a few heartbeats."""


def stream(served: Served, sampling: dict[str, Any], **request: Any) -> list[RolloutLine]:
    body = {"prompts": [prompt.model_dump(mode="json") for prompt in PROMPTS[:1]], "sampling": sampling} | request
    with served.client.stream("POST", "/rollouts", json=body) as response:
        assert response.status_code == 200, response.read()
        return [RolloutLine.model_validate_json(line) for line in response.iter_lines()]


def only_group(lines: list[RolloutLine]) -> Group:
    (group,) = [line.group for line in lines if line.group]
    return group


def heartbeats(lines: list[RolloutLine]) -> list[Progress]:
    return [line.progress for line in lines if line.progress]


# -- heartbeats ----------------------------------------------------------------------------------------------------


def test_heartbeats_say_how_many_tokens_there_are_while_a_group_decodes(served: Served) -> None:
    lines = stream(served, {**LONG, "n": 4}, heartbeat_s=HEARTBEAT_S)
    tokens = [beat.tokens for beat in heartbeats(lines)]
    assert len(tokens) >= 2
    assert all(earlier <= later for earlier, later in pairwise(tokens))
    assert 0 < tokens[-1] <= 4 * LONG["max_tokens"]
    assert tokens[0] < tokens[-1]
    assert lines[-1].group is not None, "after the last group there is nothing to wait for"


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 1, "n": 3}], ids=str)
def test_a_group_is_the_same_with_and_without_heartbeats(served: Served, sampling: dict[str, Any]) -> None:
    whole = only_group(stream(served, {**LONG, **sampling}))
    lines = stream(served, {**LONG, **sampling}, heartbeat_s=HEARTBEAT_S)
    assert heartbeats(lines)
    for expected, got in zip(whole.completions, only_group(lines).completions, strict=True):
        assert got.token_ids == expected.token_ids
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert (got.versions, got.finish_reason) == (expected.versions, expected.finish_reason)


def test_heartbeats_go_on_during_a_switch_and_the_spans_show_it(served: Served) -> None:
    before = served.generator.served.version
    version = served.next
    served.policy.change(version.step)
    digest = served.policy.publish(version)
    lines: list[RolloutLine] = []
    sampling = {**LONG, "max_tokens": 1500}
    asking = threading.Thread(target=lambda: lines.extend(stream(served, sampling, heartbeat_s=HEARTBEAT_S)))
    asking.start()
    wait_until(lambda: served.runs(1))
    served.generator.put(version, digest, SwitchMode.IN_FLIGHT).raise_for_status()
    asking.join(60)
    (completion,) = only_group(lines).completions
    assert heartbeats(lines)
    assert [span.version for span in completion.versions] == [before, version]
    assert len(completion.token_ids) == 1500


def test_several_prompts_get_their_groups_between_heartbeats(served: Served) -> None:
    body = {
        "prompts": [prompt.model_dump(mode="json") for prompt in PROMPTS],
        "sampling": {**LONG, "n": 2},
        "heartbeat_s": HEARTBEAT_S,
    }
    response = served.client.post("/rollouts", json=body).raise_for_status()
    lines = [RolloutLine.model_validate_json(line) for line in response.text.splitlines()]
    assert sorted(line.group.prompt_index for line in lines if line.group) == [0, 1, 2]
    assert heartbeats(lines)[-1].tokens <= 6 * LONG["max_tokens"]


# -- sessions ------------------------------------------------------------------------------------------------------


def test_a_session_does_not_change_what_is_sampled(served: Served) -> None:
    greedy = {"max_tokens": 10, "temperature": 0.0}
    prompt = PROMPTS[0].model_dump(mode="json")
    named = stream(served, greedy, prompts=[prompt | {"session": "row 7, episode 2"}])
    assert only_group(named).completions[0].token_ids == only_group(stream(served, greedy)).completions[0].token_ids


# -- waiting for a version -----------------------------------------------------------------------------------------


def waited(served: Served, **parameters: Any) -> ServedWeights:
    response = served.client.get("/weights", params=parameters)
    return ServedWeights.model_validate(response.raise_for_status().json())


def test_a_version_that_serves_is_answered_at_once(served: Served) -> None:
    version = served.switch()
    for at_least in (version, Version(version.step - 1, 1), Version(0, 0)):
        assert waited(served, at_least=str(at_least), wait_s=60) == served.generator.served


def test_the_answer_comes_when_the_version_or_a_newer_one_serves(served: Served) -> None:
    version = served.next
    answers: list[ServedWeights] = []
    for at_least in (version, Version(version.step - 1, 1), Version(version.step + 1, 0)):
        target = {"at_least": str(at_least), "wait_s": 60}
        asking = threading.Thread(target=lambda target=target: answers.append(waited(served, **target)))
        asking.start()
        if at_least == version:
            served.switch()
        asking.join(60)
    assert [answer.version for answer in answers] == [version] * 3
    assert {answer.manifest_digest for answer in answers} == {served.generator.served.manifest_digest}


def test_a_version_that_does_not_come_is_an_error_that_may_be_retried(served: Served) -> None:
    for parameters in ({}, {"wait_s": 0.2}):
        response = served.client.get("/weights", params={"at_least": "9999.1", **parameters})
        error = ErrorBody.model_validate(response.json())
        assert (response.status_code, error.code, error.retryable) == (409, "stale_policy", True)
        assert f"got at_least 9999.1; this generator serves {served.generator.served.version} after" in error.message


# -- bad requests and older clients --------------------------------------------------------------------------------

PROMPT = {"token_ids": [5]}
BAD: dict[str, tuple[str, str, dict[str, Any] | None, str]] = {
    "heartbeat": (
        "POST", "/rollouts", {"prompts": [PROMPT], "sampling": {"max_tokens": 1}, "heartbeat_s": 0.01},
        "body.heartbeat_s: got 0.01; expected a number greater than or equal to 0.1",
    ),
    "session": (
        "POST", "/rollouts", {"prompts": [PROMPT | {"session": ""}], "sampling": {"max_tokens": 1}},
        "body.prompts.0.session: got ''; ",
    ),
    "at_least": ("GET", "/weights?at_least=42", None, "got version '42', expected step.attempt, such as 42.1"),
    "wait_s": ("GET", "/weights?at_least=1.1&wait_s=601", None, "query.wait_s: got '601'; expected a number less than"),
    "parameter": ("GET", "/weights?at-least=1.1", None, "query.at-least: got '1.1'; Extra inputs are not permitted"),
    "protocol": ("GET", "/info?protocol=0", None, "query.protocol: got '0'; expected a number greater than or equal"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_request_gets_an_error_with_actual_and_expected_value(
    served: Served, method: str, path: str, body: dict[str, Any] | None, words: str
) -> None:
    response = served.client.request(method, path, json=body)
    error = ErrorBody.model_validate(response.json())
    assert (response.status_code, error.code) == (422, "bad_request")
    assert words in error.message


@pytest.mark.parametrize(("asked", "spoken"), [(None, 1), (1, 1), (2, 2), (99, 2)])
def test_both_sides_speak_the_newest_version_that_the_client_names(
    served: Served, asked: int | None, spoken: int
) -> None:
    answer = served.client.get("/info", params={} if asked is None else {"protocol": asked}).json()
    assert Info.model_validate(answer).protocol == spoken
    assert answer.keys() == {
        *("protocol", "generator_id", "engine", "engine_version", "model", "fingerprint", "version", "devices"),
        *("world_size", "max_model_len", "max_num_seqs", "dtype", "kinds", "max_lora_rank", "lora_heads"),
    }, "clients of version 1 refuse other keys"


def test_requests_of_version_1_get_answers_of_version_1(served: Served) -> None:
    body = {"prompts": [PROMPT], "sampling": {**LONG, "n": 2}}
    (line,) = served.client.post("/rollouts", json=body).raise_for_status().text.splitlines()
    assert json.loads(line).keys() == {"group"}
    assert served.client.get("/weights").json().keys() == {"version", "manifest_digest", "timings"}
