"""Record the conversations of one episode, token by token.

Tool loops, environments and agents all use the same recorder. Before a call, `prompt` turns the messages into token
ids. For turns that the policy has sampled, these are the recorded ids: their text is never tokenized a second time,
because the tokenizer often cuts it differently than the policy did. After the call, `record` keeps what was sampled.
The mask comes from here, never from text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from tandem_protocol.messages import Completion

from . import trajectory
from .rendering import Conversation, Renderer, Schema
from .sequences import Joined

History = Literal["keep", "template"]
"""What the policy sees of its earlier turns. `keep`: what it sampled, thinking included; an episode is one sequence.
`template`: what the chat template shows. A sequence begins wherever the template rewrites the past."""


class _Turn(NamedTuple):
    """A conversation that ends in a sampled turn."""

    exact: bytes
    """Digest of the messages, white space included."""
    token_ids: tuple[int, ...]
    """Everything up to and with the sampled turn."""


class Recorder:
    """All calls of one episode."""

    def __init__(self, renderer: Renderer, history: History = "keep") -> None:
        self.rewritten = 0
        """How often an earlier sampled turn was not continued, because its tokens could not be kept."""
        self._renderer = renderer
        self._history = history
        self._turns: dict[bytes, list[_Turn]] = {}
        self._said: set[bytes] = set()
        """Loose digests of conversations that end in a sampled turn, whatever tools they had."""
        self._joined = Joined()

    def prompt(self, messages: Conversation, tools: Sequence[Schema] = ()) -> tuple[int, ...]:
        """Return the token ids of the prompt in which the policy continues this conversation.

        If the messages extend a recorded conversation, the ids extend its recorded ids.
        """
        end, recorded = self._last_turn(messages, tools)
        if recorded is None:
            return self._renderer.tokens(self._renderer.text(messages, tools))
        behind = self._behind(recorded, messages, end, tools)
        if behind is None:
            self.rewritten += 1
            return self._renderer.tokens(self._renderer.text(messages, tools))
        return recorded + behind

    def record(
        self, messages: Conversation, tools: Sequence[Schema], prompt_ids: Sequence[int], completion: Completion
    ) -> None:
        """Keep a sampled turn.

        Args:
            messages: the conversation, with the sampled turn as its last message.
            prompt_ids: what `prompt` returned for the messages before.
        """
        self._joined.add(prompt_ids, completion)
        *_, (exact, loose) = _digests(messages, tools)
        self._turns.setdefault(loose, []).append(_Turn(exact, (*prompt_ids, *completion.token_ids)))
        *_, (_, said) = _digests(messages, ())
        self._said.add(said)

    def opening(self, messages: Conversation) -> int:
        """Return how many messages of a conversation come before its first recorded turn."""
        recorded = [loose in self._said for _, loose in _digests(messages, ())]
        return recorded.index(True) if True in recorded else len(messages)

    def sequences(self) -> tuple[trajectory.Sequence, ...]:
        """Return what the learner trains on. Each sampled token is in it exactly once."""
        return self._joined.sequences()

    def _last_turn(self, messages: Conversation, tools: Sequence[Schema]) -> tuple[int, tuple[int, ...] | None]:
        """Return the last sampled turn that the messages continue, and the number of messages up to and with it.

        A client may have changed white space. If several turns differ only in that, the exact one is preferred.
        """
        digests = list(_digests(messages, tools))
        for end in range(len(messages) - 1, 0, -1):
            exact, loose = digests[end - 1]
            if turns := self._turns.get(loose):
                return end, next((turn for turn in turns if turn.exact == exact), turns[-1]).token_ids
        return 0, None

    def _behind(
        self, recorded: tuple[int, ...], messages: Conversation, end: int, tools: Sequence[Schema]
    ) -> tuple[int, ...] | None:
        """Return the tokens that follow the recorded ones. None if the recorded ones cannot be continued."""
        behind = self._renderer.after_turn(messages, end, tools)
        if behind and behind[0] == recorded[-1] and self._renderer.ends_turn(recorded):
            behind = behind[1:]  # the policy has ended its turn itself; otherwise the template ends it
        if self._history == "template" and behind is not None:
            rewrites = self._renderer.decoded(recorded + behind) != self._renderer.text(messages, tools)
            return None if rewrites else behind
        return behind


def _digests(messages: Conversation, tools: Sequence[Schema]) -> Iterator[tuple[bytes, bytes]]:
    """Yield, after each message, the exact and the loose digest of the conversation so far.

    They are the same if a client drops keys such as the thinking, gives calls new ids, or writes arguments as JSON. The
    loose one also ignores white space.
    """
    exact, loose = (hashlib.blake2b(json.dumps(list(tools), sort_keys=True).encode()) for _ in range(2))
    for message in messages:
        said = [message["role"], message.get("content") or ""]
        for call in message.get("tool_calls") or ():
            said += [call["function"]["name"], _arguments(call["function"]["arguments"])]
        exact.update(json.dumps(said).encode() + b"\n")
        loose.update(json.dumps([" ".join(text.split()) for text in said]).encode() + b"\n")
        yield exact.digest(), loose.digest()


def _arguments(arguments: Any) -> str:
    """Return the arguments of a call as JSON with sorted keys, or as they are if they are not JSON."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return str(arguments)
    return json.dumps(parsed, sort_keys=True)
