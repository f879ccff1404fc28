"""OpenAI's routes of the mock, so that clients of vLLM can be tested without vLLM.

The mock has no tokenizer. A text becomes one token per byte, and the text of a completion is its token ids in decimal.
"""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from tandem_protocol.errors import BadRequest, TandemError
from tandem_protocol.messages import Completion, Group, Prompt, RolloutRequest, Sampling
from tandem_protocol.problems import summarize

from .vllm_routes import MAX_LOGPROBS
from .weight_switcher import WeightSwitcher

_DEFAULT_MAX_TOKENS = 16
_SAMPLING = Sampling.model_fields.keys()
_REFUSED = (
    *("stream", "prompt_logprobs", "logprob_token_ids", "echo", "suffix", "stop", "min_tokens", "bad_words"),
    *("structured_outputs", "response_format", "allowed_token_ids", "logit_bias", "repetition_detection"),
    *("frequency_penalty", "presence_penalty", "watermarking", "use_beam_search"),
    *("prompt_embeds", "truncate_prompt_tokens"),
)
"""Options of vLLM that change the form of an answer to one that the mock does not have, or which tokens it has."""
_OFF = {"response_format": {"type": "text"}}
"""Values that leave an option out, besides those that are false, such as None, 0 and []."""


def build_mock_completions(switcher: WeightSwitcher, model: str) -> APIRouter:
    """Return a router with `/v1/models`, `/v1/completions` and `/v1/chat/completions`.

    Args:
        switcher: Serves the requests.
        model: Name of the model, for the answers.
    """
    router = APIRouter(tags=["vllm"])

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Name the model."""
        length = switcher.engine.facts.max_model_len
        return {"object": "list", "data": [{"id": model, "object": "model", "max_model_len": length}]}

    @router.post("/v1/completions", response_model=None)
    async def completions(body: dict[str, Any]) -> dict[str, Any] | Response:
        """Sample completions of texts or token ids, and answer as vLLM does with `return_token_ids`."""
        return await answer("text_completion", body, _rows(body.get("prompt")))

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: dict[str, Any]) -> dict[str, Any] | Response:
        """Sample answers to a conversation, and answer as vLLM does with `return_token_ids`."""
        return await answer("chat.completion", body, [_said(body.get("messages"))])

    async def answer(kind: str, body: dict[str, Any], rows: list[Any]) -> dict[str, Any] | Response:
        try:
            vocab_size = switcher.engine.facts.vocab_size
            _check_logprobs(body, min(MAX_LOGPROBS, vocab_size))
            request = _request(body, [_token_ids(row, vocab_size) for row in rows])
            groups: list[Group] = [group async for group in switcher.rollouts(request)]
        except TandemError as error:
            return JSONResponse(error.body.model_dump(), status_code=error.status)
        return _answer(kind, body, request, sorted(groups, key=lambda group: group.prompt_index)) | {"model": model}

    return router


def _rows(prompt: Any) -> list[Any]:
    """Return the prompts of a body: it has one or a list of them, each a text or a list of token ids."""
    return prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str) else [prompt]


def _said(messages: Any) -> str | None:
    """Return the text of a conversation. None if it is not one."""
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents for part in (content if isinstance(content, list) else [{"text": content}])]
    return "\n".join(str(part.get("text") or "") for part in parts) or None


def _token_ids(row: Any, vocab_size: int | None) -> Any:
    return [byte % (vocab_size or 256) for byte in row.encode()] if isinstance(row, str) else row


def _check_logprobs(body: dict[str, Any], most: int) -> None:
    """Refuse as many logprobs as vLLM refuses. The mock has no logprobs of tokens that were not sampled.

    Raises:
        BadRequest: The body asks for more than `most` per token.
    """
    asked = [body.get("logprobs"), body.get("top_logprobs")]
    if too_many := [count for count in asked if isinstance(count, int) and count > most]:
        raise BadRequest(f"got logprobs {too_many[0]}, expected at most {most} per token. Fix: ask for fewer.")


def _request(body: dict[str, Any], rows: list[Any]) -> RolloutRequest:
    """Translate a body to a request for rollouts.

    Raises:
        BadRequest: A value is invalid, or the mock does not have an option.
    """
    if refused := [name for name in _REFUSED if body.get(name) and body[name] != _OFF.get(name)]:
        raise BadRequest(f"got {', '.join(refused)}, which the mock does not have. Fix: leave it out, or use vLLM.")
    options = {name: value for name, value in body.items() if name in _SAMPLING and value is not None}
    limit = body.get("max_completion_tokens") or _DEFAULT_MAX_TOKENS
    options = {"max_tokens": limit, **options}
    try:
        options["top_k"] = max(0, options.get("top_k", 0))
        return RolloutRequest(
            prompts=tuple(Prompt(token_ids=row, seed=body.get("seed")) for row in rows), sampling=Sampling(**options)
        )
    except ValidationError as error:
        raise BadRequest(summarize(error.errors())) from error
    except TypeError as error:
        raise BadRequest(f"got top_k {options['top_k']!r}, expected an integer. Fix: change it.") from error


def _answer(kind: str, body: dict[str, Any], request: RolloutRequest, groups: list[Group]) -> dict[str, Any]:
    choices = list(_choices(request, groups))
    for index, (choice, completion) in enumerate(choices):
        text = " ".join(str(token) for token in completion.token_ids)
        choice["index"] = index
        if kind == "chat.completion":
            choice["message"] = {"role": "assistant", "content": text, "tool_calls": []}
            choice["logprobs"] = _chat_logprobs(completion) if body.get("logprobs") else None
        else:
            choice["text"] = text
            choice["logprobs"] = _logprobs(completion) if body.get("logprobs") is not None else None
    read = sum(len(prompt.token_ids) for prompt in request.prompts)
    written = sum(len(completion.token_ids) for _, completion in choices)
    return {
        "id": f"mock-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "choices": [choice for choice, _ in choices],
        "prompt_token_ids": request.prompts[0].token_ids,
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def _choices(request: RolloutRequest, groups: list[Group]) -> Iterator[tuple[dict[str, Any], Completion]]:
    """Yield what the choices of both routes have, and the completion of each."""
    for group in groups:
        for completion in group.completions:
            choice = {
                "finish_reason": completion.finish_reason,
                "prompt_token_ids": request.prompts[group.prompt_index].token_ids,
                "token_ids": completion.token_ids,
            }
            yield choice, completion


def _named(completion: Completion) -> list[tuple[str, float]]:
    """Return the name and the logprob of each token. The names are vLLM's with `return_tokens_as_token_ids`."""
    return [(f"token_id:{token}", x) for token, x in zip(completion.token_ids, completion.logprobs, strict=True)]


def _logprobs(completion: Completion) -> dict[str, Any]:
    named = _named(completion)
    return {
        "tokens": [name for name, _ in named],
        "token_logprobs": [logprob for _, logprob in named],
        "top_logprobs": [{name: logprob} for name, logprob in named],
    }


def _chat_logprobs(completion: Completion) -> dict[str, Any]:
    named = _named(completion)
    return {"content": [{"token": name, "logprob": x, "bytes": None, "top_logprobs": []} for name, x in named]}
