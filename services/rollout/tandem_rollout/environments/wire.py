"""The HTTP contract of environments in a process of their own. docs/train/environment-server.md describes it.

The client names a session, and every request can be repeated: the same request gets the same answer, and is carried out
once. A failed request answers with the JSON of a `tandem_protocol.errors.ErrorBody`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat

from tandem_protocol.errors import TandemError
from tandem_protocol.messages import Message

PROTOCOL_VERSION = 1
"""Version of this contract."""

ENVIRONMENT = "/v1/environment"
"""GET: what is served, as `EnvironmentInfo`."""
SESSIONS = "/v1/sessions"
"""DELETE with `?owner=NAME`: close all sessions of an owner."""
SESSION = "/v1/sessions/{session}"
"""PUT `OpenSession`: begin an episode, answered with `SessionOpened`. DELETE: close the session."""
STEP = "/v1/sessions/{session}/steps/{number}"
"""PUT `TakeStep`: answer a turn of the policy, answered with `StepTaken`. The first number is 0."""
REWARDS = "/v1/sessions/{session}/rewards"
"""GET: the environment's own rewards, as `SessionRewards`."""
HEALTHZ = "/healthz"
"""GET: status 200 while the process answers. Needs no token."""

CALLS_TO_OPEN = 3
"""Calls of the project's code that a session may need to open: create an instance, enter it, reset it."""
MARGIN_S = 5.0
"""What a request may take besides the calls of the project's code, in seconds."""


class EnvironmentFailedRemotely(TandemError):
    """The project's environment raised an error or missed a deadline. The session is closed."""

    code = "environment_failed"


class UnknownSession(TandemError):
    """The server has no such session: it was closed or discarded, or the server has been restarted."""

    code = "unknown_session"
    status = 404


class SessionsFull(TandemError):
    """The server holds as many sessions as it may."""

    code = "sessions_full"
    status = 503
    retryable = True


class OutOfTurn(TandemError):
    """The request does not follow the one before: another one is running, or the number of the step is wrong."""

    code = "out_of_turn"
    status = 409


class _ServerMessage(Message):
    model_config = ConfigDict(ser_json_inf_nan="constants")
    """A column may contain NaN. Python reads and writes it, although JSON does not have it."""


def _with_role(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError("expected a message with role and content")
    return message


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(_with_role(message)["content"], str):
        raise ValueError("expected a message whose content is text")
    return message


ChatMessage = Annotated[dict[str, Any], AfterValidator(_with_role)]
"""A message of a conversation: `role`, `content`, and what else the chat template reads."""
TextMessage = Annotated[dict[str, Any], AfterValidator(_with_text)]
"""A message whose content is text."""


class EnvironmentInfo(Message):
    """What a server offers."""

    protocol: int
    """`PROTOCOL_VERSION` of the server."""
    schemas: tuple[dict[str, Any], ...]
    """All tools of all environments, as JSON schemas in OpenAI's form: `{"type": "function", "function": {...}}`."""
    answers_in_text: bool
    """Whether an environment may answer with messages of the user."""
    without_rewards: tuple[str, ...] = ()
    """Names of the environments that give no rewards of their own."""
    max_sessions: int = Field(ge=1)
    """Sessions that the server holds at the same time."""


class OpenSession(_ServerMessage):
    """Begin an episode with a row of the data set."""

    owner: str = ""
    """Who opens it. The name is the same after a restart of the client, which then closes what it left behind."""
    prompt: Any = None
    """Text or messages. Empty if the environment opens the conversation."""
    columns: dict[str, Any] = {}
    """All other columns."""


class SessionOpened(_ServerMessage):
    """How the episode begins."""

    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    """The conversation up to the first turn of the policy, the row's prompt included."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the tools that the policy may call in this episode."""


class TakeStep(_ServerMessage):
    """A turn of the policy."""

    message: ChatMessage
    """The turn as a message of the assistant. `tool_calls` are in OpenAI's form, with `arguments` as an object."""
    problem: str | None = None
    """Why a tool call could not be read, in words for the policy. null: all calls were read."""


class StepTaken(_ServerMessage):
    """How the environment answers a turn."""

    messages: tuple[TextMessage, ...] = ()
    """What the policy reads next: one message of the role `tool` for each call, or messages of the user."""
    done: bool = False
    """Whether the episode is over. The policy then reads nothing more."""
    tool_calls: int = Field(0, ge=0)
    """Tool calls that were carried out."""
    tool_errors: int = Field(0, ge=0)
    """Tool calls that failed."""


class SessionRewards(_ServerMessage):
    """The environment's own rewards."""

    rewards: dict[str, FiniteFloat | None] = {}
    """Name of the reward → value. null: no reward."""


def deadline_s(timeout_s: float, calls: int) -> float:
    """How long a server may take for a request that makes `calls` calls of the project's code."""
    return timeout_s * max(1, calls) + MARGIN_S
