"""Read the answers of generators, and turn what cannot be read into errors that say whether a retry may help."""

from __future__ import annotations

from typing import TypeVar

import httpx
from pydantic import ValidationError

from tandem_protocol.errors import (
    EngineFailed,
    ErrorBody,
    PolicyTorn,
    StalePolicy,
    SwitchFailed,
    TandemError,
    from_body,
    not_finite,
)
from tandem_protocol.messages import Group, Message, Progress, RolloutLine, RolloutRequest, ServedWeights
from tandem_protocol.problems import shorten, summarize

from .availability import LOST

MessageT = TypeVar("MessageT", bound=Message)


def reason_of(error: httpx.TransportError | TandemError) -> str:
    """Describe why a request failed. Some errors of httpx have no text."""
    silent = "no answer in time" if isinstance(error, httpx.TimeoutException) else "the connection broke"
    return f"{type(error).__name__}: {str(error) or silent}"


def event_of(error: httpx.TransportError | TandemError) -> str:
    """The kind of the event that a request failed: the generator is lost, or it serves other weights than expected."""
    if isinstance(error, StalePolicy):
        return "generator_stale"
    return "switch_failed" if isinstance(error, SwitchFailed | PolicyTorn) else LOST


def checked(response: httpx.Response) -> httpx.Response:
    """Return the response if its status is a success.

    Raises:
        TandemError: the error in the body.
        EngineFailed: a server error without such a body, for example from a proxy.
    """
    if response.is_success:
        return response
    try:
        error = from_body(ErrorBody.model_validate_json(response.content))
    except ValidationError:
        request = response.request
        got = f"{request.method} {request.url.path} answered {response.status_code}: {response.text[:200]}"
        error = EngineFailed(got) if response.is_server_error else TandemError(f"{got}. Is this a server of Tandem?")
    raise error


def read_message(kind: type[MessageT], response: httpx.Response) -> MessageT:
    """Return the message in a successful response.

    Raises:
        TandemError: the response is an error, or the message cannot be read.
    """
    try:
        return kind.model_validate_json(checked(response).content)
    except ValidationError as error:
        request = response.request
        raise TandemError(
            f"{request.method} {request.url.path} returned a body that this release cannot read: "
            f"{summarize(error.errors())}. Fix: run the same release of Tandem on both sides."
        ) from error


def read_served(response: httpx.Response) -> ServedWeights:
    """Return the answer to `PUT /weights/{version}`, with the timings in its header.

    Raises:
        TandemError: the response is an error, or the message cannot be read.
    """
    served = read_message(ServedWeights, response)
    timings = served.timings and served.timings.with_header(response.headers.get("Server-Timing", ""))
    return served.model_copy(update={"timings": timings})


def read_line(text: str) -> Group | Progress:
    """Return the group or the heartbeat in one line of a stream.

    Raises:
        TandemError: the line contains an error.
        LogprobsNotFinite: a logprob is not a finite number.
        EngineFailed: the line cannot be read.
    """
    try:
        line = RolloutLine.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors()
        for problem in problems:
            if "logprobs" in problem["loc"] and (problem["type"] == "finite_number" or problem["input"] is None):
                where = ".".join(str(part) for part in problem["loc"])
                raise not_finite(problem["input"], where) from error
        raise EngineFailed(f"a line of the answer cannot be read: {summarize(problems)}") from error
    if line.error is not None:
        raise from_body(line.error)
    answer = line.group or line.progress
    if answer is None:
        raise EngineFailed(f"a line of the answer is {shorten(text)}; expected a group or an error")
    return answer


def why_unusable(group: Group, request: RolloutRequest, prompt_count: int) -> str | None:
    """Return what is wrong with the group, or None."""
    if group.prompt_index >= prompt_count or len(group.completions) != request.sampling.n:
        return (
            f"got a group of {len(group.completions)} completions for prompt {group.prompt_index}, expected "
            f"{request.sampling.n} for one of {prompt_count} prompts"
        )
    if any(completion.finish_reason == "abort" for completion in group.completions):
        return "a completion was aborted, so it is not a sample of the policy"
    oldest = min((span.version for c in group.completions for span in c.versions), default=None)
    if request.min_version is not None and oldest is not None and oldest < request.min_version:
        return f"got tokens of version {oldest}, expected {request.min_version} or newer"
    return None
