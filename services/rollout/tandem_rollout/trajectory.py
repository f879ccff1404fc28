"""What the policy did in one episode: token sequences for the learner, messages for people and reward functions.

Example: a model calls a tool and then answers. Its episode is one `Sequence` with two sampled spans. The prompt and the
tool's result are in the same sequence, but they are not sampled, so the learner does not train on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from tandem_protocol.messages import Completion, Logprob, Message, TokenId, VersionSpan
from tandem_protocol.version import Version

NOT_SAMPLED = -1
"""Step of a token that the policy did not sample (`Sequence.steps`)."""

ChatMessage = dict[str, JsonValue]
"""A message with a `role` and a `content`, and perhaps `tool_calls` and the keys that the chat template knows."""
Status = Literal["finished", "max_tokens", "max_turns", "failed"]
"""How an episode ended. `finished`: the policy or the environment ended it. `failed`: something broke."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Reward = Annotated[float, Field(allow_inf_nan=False)]


class Span(Message):
    """Consecutive tokens of a sequence, from `start` up to and without `end`."""

    start: int = Field(ge=1)
    """First token. At least 1, because the probability of a sampled token depends on a token before it."""
    end: int
    """The token behind the last one."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> Span:
        if self.end <= self.start:
            raise ValueError(f"got a span from {self.start} to {self.end}, expected at least one token")
        return self

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.end - self.start


class Sequence(Message):
    """One context that only grew, as the policy saw it. S: its number of tokens."""

    token_ids: tuple[TokenId, ...]
    """[S] All tokens: prompt, sampled turns, and what tools and users said between them."""
    sampled: tuple[Span, ...] = ()
    """The turns that the policy sampled, in order. All other tokens are masked."""
    logprobs: tuple[Logprob, ...]
    """[S] Logprob of each sampled token under the distribution that it was sampled from. 0.0 for all other tokens."""
    versions: tuple[VersionSpan, ...] = ()
    """Policy version of every sampled token: spans in order that cover them all. Other tokens are not counted."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Sequence:
        size = len(self.token_ids)
        if len(self.logprobs) != size:
            raise ValueError(f"got {size} token ids and {len(self.logprobs)} logprobs, expected one per token")
        bounds = [0, *chain.from_iterable((span.start, span.end) for span in self.sampled), size]
        if bounds != sorted(bounds):
            spans = [(span.start, span.end) for span in self.sampled]
            raise ValueError(f"got the spans {spans} of {size} tokens, expected spans in order that do not overlap")
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            if any(self.logprobs[start:end]):
                raise ValueError(f"got logprobs for tokens {start} to {end}, expected 0.0: they were not sampled")
        if (versioned := sum(span.tokens for span in self.versions)) != self.num_sampled:
            raise ValueError(f"got versions of {versioned} tokens, expected {self.num_sampled}, one per sampled token")
        return self

    @classmethod
    def of_completion(cls, prompt_ids: Iterable[int], completion: Completion) -> Sequence:
        """The sequence of a single turn."""
        prompt = tuple(prompt_ids)
        size = len(prompt) + len(completion.token_ids)
        return cls(
            token_ids=prompt + completion.token_ids,
            sampled=(Span(start=len(prompt), end=size),) if completion.token_ids else (),
            logprobs=(0.0,) * len(prompt) + completion.logprobs,
            versions=completion.versions,
        )

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens."""
        return sum(span.size for span in self.sampled)

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """The sampled tokens, in order."""
        return tuple(chain.from_iterable(self.token_ids[span.start : span.end] for span in self.sampled))

    @property
    def mask(self) -> list[int]:
        """[S] 1 for each sampled token, 0 for each other token."""
        mask = [0] * len(self.token_ids)
        for span in self.sampled:
            mask[span.start : span.end] = [1] * span.size
        return mask

    @property
    def steps(self) -> list[int]:
        """[S] Version step of the policy that sampled the token. `NOT_SAMPLED` for each other token."""
        sampled = list(chain.from_iterable([span.version.step] * span.tokens for span in self.versions))
        steps = [NOT_SAMPLED] * len(self.token_ids)
        done = 0
        for span in self.sampled:
            steps[span.start : span.end] = sampled[done : done + span.size]
            done += span.size
        return steps

    @property
    def oldest_version(self) -> Version | None:
        """The oldest version that sampled any token. None if no token was sampled."""
        return min((span.version for span in self.versions if span.tokens), default=None)

    def staleness(self, step: int) -> Counter[int]:
        """Number of optimizer steps between sampling and the update number `step` → number of sampled tokens."""
        lags: Counter[int] = Counter()
        for span in self.versions:
            lags[step - span.version.step] += span.tokens
        return +lags


class Timings(Message):
    """Where the time of an episode went, in seconds. What is missing in `total_s` is waiting for other episodes."""

    total_s: Seconds = 0.0
    decode_s: Seconds = 0.0
    """Waiting for the generators."""
    environment_s: Seconds = 0.0
    """In tools and in the environment's other methods."""


class Trajectory(Message):
    """One episode."""

    sequences: tuple[Sequence, ...]
    """More than one if the context was rewritten: the template dropped earlier thinking, or an agent forked it."""
    messages: tuple[ChatMessage, ...]
    """The conversation. It is never tokenized again."""
    num_prompt_messages: int = Field(0, ge=0)
    """Number of `messages` that the episode began with."""
    rewards: dict[str, Reward | None] = {}
    """Name of the reward → its value, without the weight. None if it has no opinion."""
    reward: Reward | None = None
    """The weighted sum of `rewards`, or None if there is no reward."""
    status: Status
    reason: str | None = None
    """Why the episode failed. None if it did not."""
    turns: int = Field(0, ge=0)
    """Number of turns that the policy sampled."""
    tool_calls: int = Field(0, ge=0)
    tool_errors: int = Field(0, ge=0)
    """Number of tool calls that were answered with an error."""
    timings: Timings = Timings()

    @model_validator(mode="after")
    def _is_consistent(self) -> Trajectory:
        if (self.reason is None) == (self.status == "failed"):
            raise ValueError(f"got status {self.status} with reason {self.reason!r}, expected one exactly if it failed")
        if self.num_prompt_messages > len(self.messages):
            raise ValueError(
                f"got {len(self.messages)} messages, expected at least the prompt's {self.num_prompt_messages}"
            )
        return self

    @property
    def prompt(self) -> tuple[ChatMessage, ...]:
        """The messages that the episode began with."""
        return self.messages[: self.num_prompt_messages]

    @property
    def completion(self) -> tuple[ChatMessage, ...]:
        """All messages behind the prompt: the policy's, and those of tools and users."""
        return self.messages[self.num_prompt_messages :]

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens. Token totals of losses count these only."""
        return sum(sequence.num_sampled for sequence in self.sequences)

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """The sampled tokens of all sequences, in order."""
        return tuple(chain.from_iterable(sequence.sampled_ids for sequence in self.sequences))

    @property
    def truncated(self) -> bool:
        """Whether a limit ended the episode, and not the policy or the environment."""
        return self.status in ("max_tokens", "max_turns")

    @property
    def in_loss(self) -> bool:
        """Whether its reward counts: algorithms compare it with others, and the learner can train on it."""
        return self.status != "failed" and self.reward is not None and self.num_sampled > 0

    @property
    def oldest_version(self) -> Version | None:
        """The oldest version that sampled any token. None if no token was sampled."""
        return _oldest(sequence.oldest_version for sequence in self.sequences)

    def staleness(self, step: int) -> Counter[int]:
        """See `Sequence.staleness`."""
        return sum((sequence.staleness(step) for sequence in self.sequences), Counter[int]())

    def lag(self, step: int) -> int:
        """The largest staleness of any sampled token. 0 if no token was sampled."""
        return max(self.staleness(step), default=0)


class Group(Message):
    """The trajectories of one row of the data set. Advantages compare them with each other."""

    row: int = Field(ge=0)
    """Index of the row in the data set."""
    trajectories: tuple[Trajectory, ...] = Field(min_length=1)

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ. If all are equal, every advantage is 0."""
        return len({reward for reward in self.rewards if reward is not None}) > 1

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """The reward of each trajectory; None if it does not count."""
        return tuple(trajectory.reward if trajectory.in_loss else None for trajectory in self.trajectories)

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens."""
        return sum(trajectory.num_sampled for trajectory in self.trajectories)

    @property
    def oldest_version(self) -> Version | None:
        """The oldest version that sampled any token. None if no token was sampled."""
        return _oldest(trajectory.oldest_version for trajectory in self.trajectories)

    def staleness(self, step: int) -> Counter[int]:
        """See `Sequence.staleness`."""
        return sum((trajectory.staleness(step) for trajectory in self.trajectories), Counter[int]())

    def lag(self, step: int) -> int:
        """See `Trajectory.lag`."""
        return max(self.staleness(step), default=0)


def _oldest(versions: Iterable[Version | None]) -> Version | None:
    return min((version for version in versions if version is not None), default=None)
