"""What an agent asks the policy in one episode: chat calls in the shape of the OpenAI API, recorded token by token.

This module speaks no HTTP; proxy.py does.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tandem_protocol.messages import Completion

from .episode import Limits, Sample
from .recorder import History, Recorder
from .rendering import Conversation, Renderer, Schema
from .stop_strings import stopped
from .trajectory import Status
from .turns import TurnReader

ReaderFor = Callable[[Sequence[Schema]], TurnReader]
"""Tools of a call → what reads its answer."""
Normalize = Callable[[Any], Conversation]
"""Messages as clients write them → messages with text only. Raises ValueError."""


class CallRefused(Exception):
    """A call that cannot be answered. The agent gets the message with status 400."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


class ChatCall(BaseModel):
    """The parts of a chat completion request that matter here.

    The session decides how to sample, so `temperature`, `top_p`, `seed` and penalties of the client are ignored: the
    learner must know the distribution. What would change it in another way is refused. Exceptions are `strict` tools
    and `tool_choice: required`, which some libraries send by default: they are read as ordinary tools and as `auto`.
    """

    model_config = ConfigDict(extra="ignore")

    messages: list[Any] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    n: int | None = None
    logit_bias: dict[str, Any] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def schemas(self) -> list[Schema]:
        """The tools that the policy may call. `strict` is dropped: it would ask for a grammar."""
        if self.tool_choice == "none":
            return []
        return [
            {**tool, "function": {k: v for k, v in tool.get("function", {}).items() if k != "strict"}}
            for tool in self.tools or ()
        ]

    @property
    def stops(self) -> list[str]:
        """Strings that end the answer."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]

    @property
    def most_tokens(self) -> int | None:
        """The client's own limit."""
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        """Refuse what would change the distribution that tokens are sampled from, or what is not supported.

        Raises:
            CallRefused: the call asks for it; says what.
        """
        asked = {
            f"tool_choice {self.tool_choice!r}": self.tool_choice not in (None, "auto", "none", "required"),
            "response_format": (self.response_format or {}).get("type", "text") != "text",
            "logit_bias": bool(self.logit_bias),
        }
        if refused := [name for name, is_asked in asked.items() if is_asked]:
            raise CallRefused(
                f"got {', '.join(refused)}, which restricts what the policy can sample. The logprobs would then not be "
                "the policy's, and it could not be trained. Fix: leave it out, and check the answer in the agent."
            )
        if self.n not in (None, 1):
            raise CallRefused(f"got n: {self.n}, expected 1. Fix: make {self.n} calls.")


@dataclass
class Answer:
    """A sampled turn, and what it takes to record it."""

    call: ChatCall
    messages: Conversation
    """The conversation, with the answer as its last message."""
    prompt_ids: tuple[int, ...]
    completion: Completion
    identity: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created_s: int = field(default_factory=lambda: int(time.time()))
    recorded: bool = False

    def body(self, model: str) -> dict[str, Any]:
        """Return the answer in the shape of the OpenAI API."""
        message = dict(self.messages[-1])
        calls = message.pop("tool_calls", None)
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [{**call, "function": _as_json(call["function"])} for call in calls]
        cut_off = self.completion.finish_reason == "length"
        finish_reason = "tool_calls" if calls else "length" if cut_off else "stop"
        sizes = {"prompt_tokens": len(self.prompt_ids), "completion_tokens": len(self.completion.token_ids)}
        return {
            "id": self.identity,
            "object": "chat.completion",
            "created": self.created_s,
            "model": model,
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
            "usage": {**sizes, "total_tokens": sum(sizes.values())},
        }


def _as_json(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


class Session:
    """One episode of an agent."""

    def __init__(
        self,
        renderer: Renderer,
        reader_for: ReaderFor,
        sample: Sample,
        limits: Limits,
        normalize: Normalize,
        history: History = "keep",
        first_turn: int = 0,
    ) -> None:
        """
        Args:
            first_turn: number of the first turn for `sample`.
        """
        self.key = secrets.token_urlsafe(32)
        """What the agent authenticates with."""
        self.status: Status = "finished"
        self.error: Exception | None = None
        """An error of the generators or of the tool parser, which ends the run and not only the episode."""
        self.turns = 0
        """Number of recorded turns."""
        self.tool_calls = 0
        self.decode_s = 0.0
        self.messages: Conversation = []
        """The longest conversation."""
        self.num_prompt_messages = 0
        self.recorder = Recorder(renderer, history)
        self._renderer = renderer
        self._reader_for = reader_for
        self._sample = sample
        self._limits = limits
        self._normalize = normalize
        self._sampled_tokens = 0
        self.next_turn = first_turn
        """Number of the next turn for `sample`."""
        self._answering = 0
        self._answers: dict[str, Answer] = {}

    def answered(self, identity: str, *, is_retry: bool) -> Answer | None:
        """Return the earlier answer to the same request, if the client repeats it because it did not get the answer.

        Args:
            identity: digest of the request.
            is_retry: whether the client says that it is a retry.
        """
        answer = self._answers.get(identity)
        return answer if answer is not None and (is_retry or not answer.recorded) else None

    async def ask(self, identity: str, call: ChatCall) -> Answer:
        """Sample an answer. `record` makes it part of the episode.

        Raises:
            CallRefused: the call cannot be answered.
        """
        call.check()
        if self.turns + self._answering >= self._limits.max_turns:
            self.status = "max_turns"
            raise CallRefused(f"the episode has had {self._limits.max_turns} turns, its limit", "max_turns")
        try:
            messages = self._normalize(call.messages)
            prompt = self.recorder.prompt(messages, call.schemas)
            reader = self._reader_for(call.schemas)
        except Exception as error:  # a template can raise anything: it is a program by the model's authors
            raise CallRefused(str(error)) from error
        room = self._room(prompt, call)
        try:
            return self._answer(identity, call, messages, prompt, reader, await self._sampled(prompt, room))
        except Exception as error:
            self.error = error
            raise

    def _answer(
        self,
        identity: str,
        call: ChatCall,
        messages: Conversation,
        prompt: tuple[int, ...],
        reader: TurnReader,
        sampled: Completion,
    ) -> Answer:
        """Make an answer of what was sampled."""
        completion = stopped(sampled, call.stops, lambda count: self._renderer.decoded(sampled.token_ids[:count]))
        self._sampled_tokens += len(completion.token_ids)
        message = reader.read(completion.token_ids, prompt, call.schemas).message
        for stop in call.stops:  # the API leaves stop strings out of the text
            message["content"] = message["content"].partition(stop)[0]
        for number, sent in enumerate(message.get("tool_calls", ()), start=self._sampled_tokens):
            sent["id"] = f"call{number:05d}"  # clients expect ids that are unique in a conversation
        answer = Answer(call, [*messages, message], prompt, completion)
        self._answers[identity] = answer
        return answer

    def record(self, answer: Answer) -> None:
        """Make an answer part of the episode, once."""
        if answer.recorded:
            return
        answer.recorded = True
        self.turns += 1
        self.tool_calls += len(answer.messages[-1].get("tool_calls", ()))
        self.recorder.record(answer.messages, answer.call.schemas, answer.prompt_ids, answer.completion)
        if len(answer.messages) > len(self.messages):
            self.messages = answer.messages
            self.num_prompt_messages = self.recorder.opening(answer.messages)

    async def _sampled(self, prompt: tuple[int, ...], room: int) -> Completion:
        turn, self.next_turn = self.next_turn, self.next_turn + 1
        self._answering += 1
        begin_s = time.monotonic()
        try:
            return await self._sample(prompt, max_tokens=room, turn=turn)
        finally:
            self._answering -= 1
            self.decode_s += time.monotonic() - begin_s

    def _room(self, prompt: tuple[int, ...], call: ChatCall) -> int:
        limits = self._limits
        room = limits.max_tokens - self._sampled_tokens
        if limits.max_model_len is not None:
            room = min(room, limits.max_model_len - len(prompt))
        if room < 1:
            self.status = "max_tokens"
            raise CallRefused("the episode has no tokens left", "context_length_exceeded")
        return min([room, *(most for most in (limits.max_turn_tokens, call.most_tokens) if most)])
