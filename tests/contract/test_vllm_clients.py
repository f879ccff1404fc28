"""What clients of vLLM, such as TRL's, ask of a generator: routes, authentication, and refusals."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from support import trl
from support.generators import TOKEN
from support.served import MAX_MODEL_LEN, PROMPTS, VOCAB, Served
from tandem_generator.auth import ROUND_THE_SWITCHER
from tandem_protocol.errors import ErrorBody
from tandem_trainer.trl.stop_strings import StopStrings

HARMLESS = {
    *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages"),
    *("/v1/responses/{response_id}/cancel", "/v1/messages/count_tokens", "/v1/systemone", "/cohere/v2/chat"),
    *("/inference/v1/generate", "/invocations", "/ping", "/tokenize", "/detokenize", "/generative_scoring"),
    *("/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render", "/v1/responses/render"),
    *("/cohere/v2/chat/render", "/v1/chat/completions/derender", "/v1/completions/derender"),
    *("/classify", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    *("/v1/embeddings", "/v2/embed", "/v1/audio/transcriptions", "/v1/audio/translations"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/is_scaling_elastic_ep"),
    *("/start_profile", "/stop_profile"),
}
"""Routes of vLLM that sample, or change nothing that lasts."""


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def name_of_model(served: Served) -> str:
    (model,) = served.client.get("/v1/models").json()["data"]
    return str(model["id"])


def test_health_is_open_as_with_vllm(served: Served) -> None:
    assert served.client.get("/health", headers={"Authorization": ""}).status_code == 200


@pytest.mark.parametrize("user", ["tandem", "", "any"])
def test_the_token_is_accepted_as_the_password_in_a_url(served: Served, user: str) -> None:
    assert served.client.get("/weights", headers=basic(user, TOKEN)).status_code == 200


@pytest.mark.parametrize(
    "header",
    [basic("tandem", "another"), basic(TOKEN, ""), {"Authorization": "Basic %%%"}, {"Authorization": f"Basic {TOKEN}"}],
    ids=["another password", "token as user", "not base64", "no user"],
)
def test_another_password_is_refused(served: Served, header: dict[str, str]) -> None:
    response = served.client.get("/weights", headers=header)
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")


def test_the_configuration_that_trl_reads_is_there_without_development_mode(served: Served) -> None:
    config = served.client.get("/server_info", params={"config_format": "json"}).json()["vllm_config"]
    assert config["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert config["model_config"]["max_model_len"] == MAX_MODEL_LEN
    assert config["weight_transfer_config"]["backend"] == "tandem"
    assert isinstance(served.client.get("/server_info").json()["vllm_config"], str)


def test_the_ranks_for_nccl_and_the_prefix_cache_are_there_without_development_mode(served: Served) -> None:
    assert served.client.get("/get_world_size").json() == {"world_size": 0}, "TRL would wait for more"
    assert served.client.post("/reset_prefix_cache").json() == {"success": True}


@pytest.mark.trl
@pytest.mark.parametrize("python", [trl.PYTHONS.get("1.16.0", trl.NEWEST)], ids=["1.16.0"])
def test_trls_own_client_generates_and_learns_at_once_why_it_cannot_send_weights(served: Served, python: Path) -> None:
    url = f"http://tandem:{TOKEN}@127.0.0.1:{served.generator.port}"
    script = Path(trl.__file__).with_name("trl_own_client.py")
    process = subprocess.run([python, "-P", script, url], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    said = json.loads(process.stdout.splitlines()[-1])
    assert said["logprobs_mode"] == "processed_logprobs"
    for answer in (said["generate"], said["chat"]):
        assert [len(ids) > 0 for ids in answer["completion_ids"]] == [True] * 4
        assert [len(row) for row in answer["logprobs"]] == [len(ids) for ids in answer["completion_ids"]]
    assert said["generate"]["prompt_ids"] == [[5, 9, 13], [7, 7]]
    assert "422" in said["refused"]
    assert "python -m tandem_trainer.trl" in said["refused"]


@pytest.mark.parametrize("path", [*sorted(ROUND_THE_SWITCHER), "/adapters/name"])
@pytest.mark.parametrize("end", ["", "/"])
def test_weights_change_and_the_engine_pauses_only_through_the_switcher(served: Served, path: str, end: str) -> None:
    response = served.client.post(path + end, json={})
    error = ErrorBody.model_validate(response.json())
    assert (response.status_code, error.code) == (422, "bad_request"), "TRL does not repeat it"
    assert "tandem_trainer.trl" in error.message
    assert served.client.get("/readyz").status_code == 200


@pytest.mark.vllm
def test_every_route_of_vllm_that_changes_something_is_known() -> None:
    """A new version of vLLM may have further ones. Then add them to `ROUND_THE_SWITCHER`, or to `HARMLESS` here."""
    found = importlib.util.find_spec("vllm.entrypoints")
    assert found is not None
    assert found.submodule_search_locations
    (folder,) = found.submodule_search_locations
    sources = [file.read_text() for file in Path(folder).rglob("*.py")]
    decorators = [re.findall(r'@\w+\.(?:post|put|patch|delete|api_route)\(\s*"([^"]+)"', source) for source in sources]
    routes = {path for paths in decorators for path in paths}
    assert {"/v1/completions", "/update_weights", "/weight_checker"} <= routes
    assert routes - ROUND_THE_SWITCHER == HARMLESS


def test_completions_of_token_ids_have_ids_and_logprobs(served: Served) -> None:
    body = {
        "model": name_of_model(served), "prompt": [[5, 9, 13], [7, 7]], "n": 2, "max_tokens": 6, "logprobs": 0,
        "top_k": -1, "repetition_penalty": 1.0, "min_p": 0.0,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    choices = served.client.post("/v1/completions", json=body).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[5, 9, 13]] * 2 + [[7, 7]] * 2
    for choice in choices:
        tokens = [f"token_id:{token}" for token in choice["token_ids"]]
        logprobs = choice["logprobs"]
        assert (0 < len(tokens) <= 6, logprobs["tokens"]) == (True, tokens)
        assert [top[token] for top, token in zip(logprobs["top_logprobs"], tokens, strict=True)] == (
            logprobs["token_logprobs"]
        )


def test_a_conversation_gets_answers_with_ids_and_logprobs(served: Served) -> None:
    body = {
        "model": name_of_model(served), "messages": [{"role": "user", "content": "12+34="}], "n": 2, "max_tokens": 6,
        "logprobs": True, "top_logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    answer = served.client.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert len(answer["prompt_token_ids"]) > 0
    assert len(answer["choices"]) == 2
    for choice in answer["choices"]:
        tokens = [f"token_id:{token}" for token in choice["token_ids"]]
        assert 0 < len(tokens) <= 6
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == tokens
        assert (choice["message"]["role"], type(choice["message"]["content"])) == ("assistant", str)
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])


@pytest.mark.parametrize("asked", [{"logprobs": 100}, {"logprobs": VOCAB + 1}, {"top_logprobs": 100, "logprobs": True}])
def test_more_logprobs_than_the_vocabulary_has_tokens_are_refused_and_the_engine_goes_on(
    served: Served, asked: dict[str, object]
) -> None:
    body = {"model": name_of_model(served), "max_tokens": 2}
    if "top_logprobs" in asked:
        refused = served.client.post(
            "/v1/chat/completions", json=body | asked | {"messages": [{"role": "user", "content": "1+1"}]}
        )
    else:
        refused = served.client.post("/v1/completions", json=body | asked | {"prompt": [5, 9]})
    assert refused.status_code in (400, 422), refused.text
    assert "logprobs" in refused.text
    assert str(VOCAB) in refused.text
    accepted = served.client.post("/v1/completions", json=body | {"prompt": [5, 9], "logprobs": VOCAB})
    assert accepted.status_code == 200, accepted.text


@pytest.mark.parametrize("served", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)
@pytest.mark.parametrize("begins", range(0, 14, 3))
def test_a_stop_string_cuts_a_rollout_where_vllm_ends_a_completion(served: Served, begins: int) -> None:
    options = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    prompt = PROMPTS[0].token_ids
    tokenizer = AutoTokenizer.from_pretrained(name_of_model(served))
    (group,) = served.generator.rollouts(PROMPTS[0], **options)
    stop = tokenizer.decode(group.completions[0].token_ids[begins:], skip_special_tokens=True)[:2]
    body = {"model": name_of_model(served), "prompt": prompt, "stop": [stop, "??"], "return_token_ids": True} | options
    (choice,) = served.client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    found = StopStrings({"stop": [stop, "??"]}).cut(prompt, group.completions[0], tokenizer)
    assert list(found.token_ids) == choice["token_ids"]
    assert len(found.token_ids) < options["max_tokens"], "it has a stop string"


def test_prompts_may_be_texts(served: Served) -> None:
    body = {"model": name_of_model(served), "prompt": ["12+34=", "7"], "max_tokens": 4, "return_token_ids": True}
    choices = served.client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    assert [len(choice["prompt_token_ids"]) for choice in choices] == [6, 1]
    assert all(choice["text"] and choice["token_ids"] for choice in choices)


@pytest.mark.parametrize("served", ["mock"], indirect=True)
@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt": [5], "stream": True}, "got stream, which the mock does not have"),
        ("/v1/completions", {"prompt": [5], "prompt_logprobs": 3}, "got prompt_logprobs, which the mock does not have"),
        ("/v1/completions", {"prompt": [5], "stop": "x", "min_tokens": 2}, "got stop, min_tokens, which the mock"),
        ("/v1/completions", {"prompt": [5], "structured_outputs": {"regex": "a"}}, "got structured_outputs, which"),
        ("/v1/completions", {"prompt": [5], "frequency_penalty": -0.5}, "got frequency_penalty, which the mock does"),
        ("/v1/completions", {"prompt": [5], "logit_bias": {"7": 9.0}}, "got logit_bias, which the mock does not have"),
        ("/v1/completions", {"prompt": [5], "response_format": {"type": "json_object"}}, "got response_format, which"),
        ("/v1/completions", {"prompt": [5], "top_k": "all"}, "got top_k 'all', expected an integer"),
        ("/v1/completions", {}, "token_ids"),
        ("/v1/chat/completions", {"messages": []}, "token_ids"),
        ("/v1/chat/completions", {"messages": "hello"}, "token_ids"),
    ],
)
def test_what_the_mock_does_not_have_is_refused(served: Served, path: str, body: dict[str, object], message: str):
    response = served.client.post(path, json=body)
    assert (response.status_code, response.json()["code"]) == (422, "bad_request")
    assert message in response.json()["message"]


@pytest.mark.parametrize("served", ["mock"], indirect=True)
@pytest.mark.parametrize("off", [None, [], {}, 0, 0.0, False])
def test_an_option_that_is_off_is_accepted_by_the_mock(served: Served, off: object) -> None:
    names = ("stop", "structured_outputs", "frequency_penalty", "presence_penalty", "logit_bias", "bad_words", "stream")
    body = {"prompt": [5, 9], "response_format": {"type": "text"}} | dict.fromkeys(names, off)
    assert served.client.post("/v1/completions", json=body).status_code == 200
