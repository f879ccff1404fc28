"""Join the calls of one episode into sequences. A call that continues an earlier one continues its sequence."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Sequence_
from typing import NamedTuple

from tandem_protocol.messages import Completion, VersionSpan

from .trajectory import Sequence, Span


class Call(NamedTuple):
    """One request to the policy and its answer."""

    prompt_ids: tuple[int, ...]
    completion: Completion


def join(calls: Iterable[Call]) -> tuple[Sequence, ...]:
    """Join calls, given in the order in which they ended.

    Each sampled token is trained exactly once. If two calls continue the same earlier call, the first one continues its
    sequence. The second one begins a sequence, whose copy of the earlier tokens is not sampled.
    """
    joined = Joined()
    for call in calls:
        joined.add(*call)
    return joined.sequences()


class Joined:
    """The sequences so far."""

    def __init__(self) -> None:
        self._open: list[_Open] = []

    def add(self, prompt_ids: Sequence_[int], completion: Completion) -> None:
        """Add a call: continue the longest sequence that its prompt begins with, or begin a sequence.

        A call without sampled tokens is left out: there is nothing to learn from it.
        """
        if not completion.token_ids:
            return
        prompt = list(prompt_ids)
        continued = [one for one in self._open if prompt[: len(one.token_ids)] == one.token_ids]
        sequence = max(continued, key=lambda one: len(one.token_ids), default=None)
        if sequence is None:
            sequence = _Open()
            self._open.append(sequence)
        sequence.extend(prompt, completion)

    def sequences(self) -> tuple[Sequence, ...]:
        """Return them in the order in which they began."""
        return tuple(one.closed() for one in self._open)


class _Open:
    """A sequence that still grows."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._sampled: list[Span] = []
        self._logprobs: list[float] = []
        self._versions: list[VersionSpan] = []

    def extend(self, prompt: list[int], completion: Completion) -> None:
        self._logprobs += [0.0] * (len(prompt) - len(self.token_ids)) + list(completion.logprobs)
        self.token_ids = prompt + list(completion.token_ids)
        self._sampled.append(Span(start=len(prompt), end=len(self.token_ids)))
        self._versions += completion.versions

    def closed(self) -> Sequence:
        return Sequence(
            token_ids=tuple(self.token_ids),
            sampled=tuple(self._sampled),
            logprobs=tuple(self._logprobs),
            versions=tuple(self._versions),
        )
