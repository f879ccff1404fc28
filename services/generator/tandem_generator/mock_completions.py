"""`/v1/models` and `/v1/completions` of the mock, so that clients of vLLM can be tested without vLLM.

The mock has no tokenizer: prompts are token ids, and the text of a completion is empty.
"""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from tandem_protocol.errors import BadRequest, TandemError
from tandem_protocol.messages import Completion, Group, Prompt, RolloutRequest, Sampling
from tandem_protocol.problems import summarize

from .weight_switcher import WeightSwitcher

_DEFAULT_MAX_TOKENS = 16
_SAMPLING = Sampling.model_fields.keys()


def build_mock_completions(switcher: WeightSwitcher, model: str) -> APIRouter:
    """Return a router with both routes.

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
        """Sample completions of token ids, and answer as vLLM does with `return_token_ids`."""
        try:
            request = _request(body)
            groups: list[Group] = [group async for group in switcher.rollouts(request)]
        except TandemError as error:
            return JSONResponse(error.body.model_dump(), status_code=error.status)
        groups.sort(key=lambda group: group.prompt_index)
        choices = list(_choices(request, groups, has_logprobs=body.get("logprobs") is not None))
        return {"object": "text_completion", "model": model, "choices": choices}

    return router


def _request(body: dict[str, Any]) -> RolloutRequest:
    """Translate the body to a request for rollouts.

    Raises:
        BadRequest: The prompt is text, or a value is invalid.
    """
    prompts = body.get("prompt")
    rows = prompts if isinstance(prompts, list) and prompts and isinstance(prompts[0], list) else [prompts]
    options = {name: value for name, value in body.items() if name in _SAMPLING and value is not None}
    options = {"max_tokens": _DEFAULT_MAX_TOKENS, **options}
    options["top_k"] = max(0, options.get("top_k", 0))
    try:
        return RolloutRequest(
            prompts=tuple(Prompt(token_ids=row, seed=body.get("seed")) for row in rows), sampling=Sampling(**options)
        )
    except ValidationError as error:
        raise BadRequest(f"{summarize(error.errors())} (the mock has no tokenizer: send token ids)") from error


def _choices(request: RolloutRequest, groups: list[Group], *, has_logprobs: bool) -> Iterator[dict[str, Any]]:
    completions = [(group.prompt_index, completion) for group in groups for completion in group.completions]
    for index, (prompt, completion) in enumerate(completions):
        yield {
            "index": index,
            "text": "",
            "finish_reason": completion.finish_reason,
            "prompt_token_ids": request.prompts[prompt].token_ids,
            "token_ids": completion.token_ids,
            "logprobs": _logprobs(completion) if has_logprobs else None,
        }


def _logprobs(completion: Completion) -> dict[str, Any]:
    tokens = [f"token_id:{token}" for token in completion.token_ids]
    return {
        "tokens": tokens,
        "token_logprobs": completion.logprobs,
        "top_logprobs": [{token: logprob} for token, logprob in zip(tokens, completion.logprobs, strict=True)],
    }
