"""The sampled tokens of a logged trajectory: their texts, logprobs and versions, as `rollouts.jsonl` has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tandem_protocol.messages import VersionSpan
from tandem_rollout.trajectory import Sequence as TokenSequence
from tandem_rollout.trajectory import Span, Trajectory

from ..learner.trained_tokens import TrainedTokens

DIGITS = 4
"""Logprobs are rounded to 0.0001 nats: finer than bfloat16 computes, and short to write."""
_INCOMPLETE = "�"
"""Stands in a decoded text for bytes that are not a complete character."""
_LONGEST_CHARACTER = 8
"""Tokens of bytes that never become a character are shown as they are after this number of them."""
TEXT_LENGTH = 128
"""Longest text of a token, in characters. A tokenizer may have tokens of any length."""


class TokenTexts:
    """The text of each token within its context. Texts of known tokens are remembered, so a step costs little."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """Return one text per token. Joined, they are the text of all tokens, special tokens included.

        If several tokens make up one character, the last of them has it and the others are empty.
        """
        texts: list[str] = []
        pending: list[int] = []
        for token in token_ids:
            text = self._of(token)
            if pending or _INCOMPLETE in text:
                pending.append(token)
                text = self._decoded(pending)
                if text.endswith(_INCOMPLETE) and len(pending) < _LONGEST_CHARACTER:
                    texts.append("")
                    continue
                pending = []
            texts.append(text)
        if pending:
            texts[-1] = self._decoded(pending)
        return texts

    def _of(self, token: int) -> str:
        if token not in self._known:
            # Decoded twice, because some tokenizers drop the space of the first token.
            once, twice = self._decoded([token]), self._decoded([token, token])
            self._known[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._known[token]

    def _decoded(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


class TokenLog(NamedTuple):
    """Makes the fields about tokens of a trajectory's line."""

    texts: TokenTexts | None = None
    """None: no tokens are logged."""
    limit: int = 0
    """How many tokens of a trajectory are logged at most."""
    trained: TrainedTokens | None = None
    """None: nothing was learned from the trajectories."""

    def fields(self, trajectory: Trajectory) -> dict[str, Any]:
        """Return `advantage` and `spans`."""
        return {
            "advantage": round(self.trained.advantage(trajectory), 6) if self.trained else 0.0,
            "spans": [*self._spans(trajectory)],
        }

    def _spans(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        left = self.limit
        messages = _Messages(trajectory)
        for sequence in trajectory.sequences:
            of_trainer = self.trained.logprobs(sequence) if self.trained else None
            versions = _by_token(sequence.versions)
            for number, span in enumerate(sequence.sampled):
                if left <= 0 or self.texts is None:
                    return
                logged = Span(start=span.start, end=min(span.end, span.start + left))
                left -= logged.size
                of_span = of_trainer[number] if of_trainer else None
                yield self._span(sequence, logged, of_span, messages) | {
                    "versions": _counted(islice(versions, span.size), logged.size)
                }

    def _span(
        self, sequence: TokenSequence, span: Span, of_trainer: list[float] | None, messages: _Messages
    ) -> dict[str, Any]:
        assert self.texts is not None
        texts = self.texts(sequence.token_ids[span.start : span.end])
        return {
            "message": messages.index_of("".join(texts)),
            "text": [_shortened(text) for text in texts],
            "sampler": _rounded(sequence.logprobs[span.start : span.end]),
            "trainer": None if of_trainer is None else _rounded(of_trainer[: span.size]),
        }


NO_TOKENS = TokenLog()


class _Messages:
    """The messages of the policy, in order, that no span has been found for."""

    def __init__(self, trajectory: Trajectory) -> None:
        self._left = {
            index: str(message.get("content") or "").strip()
            for index, message in enumerate(trajectory.messages)
            if index >= trajectory.num_prompt_messages and message.get("role") == "assistant"
        }

    def index_of(self, text: str) -> int | None:
        """Return the first message that the text of a span contains, or begins; None if there is none."""
        found = next((index for index, said in self._left.items() if said in text or said.startswith(text)), None)
        if found is not None:
            del self._left[found]
        return found


def _by_token(versions: Iterable[VersionSpan]) -> Iterator[str]:
    """Yield the version of each sampled token."""
    return chain.from_iterable([str(span.version)] * span.tokens for span in versions)


def _counted(versions: Iterable[str], limit: int) -> list[list[Any]]:
    """Return pairs of a version and its number of tokens in a row, of the first `limit` tokens. Takes all versions."""
    counted: list[list[Any]] = []
    for number, version in enumerate(versions):
        if number >= limit:
            continue
        if counted and counted[-1][0] == version:
            counted[-1][1] += 1
        else:
            counted.append([version, 1])
    return counted


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[: TEXT_LENGTH - 1]}…"


def _rounded(logprobs: Sequence[float]) -> list[float]:
    return [round(logprob, DIGITS) + 0.0 for logprob in logprobs]  # + 0.0 makes 0.0 of -0.0
