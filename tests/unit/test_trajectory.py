"""A trajectory says exactly which tokens the policy sampled, and survives JSON unchanged."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tandem_protocol.messages import Completion, VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.trajectory import NOT_SAMPLED, Group, Sequence, Span, Timings, Trajectory

V1, V2, RESUMED = Version(1, 1), Version(2, 1), Version(1, 2)


def sequence(**changes: Any) -> Sequence:
    """A prompt of two tokens, two sampled tokens, one token of a tool, one sampled token."""
    given: dict[str, Any] = {
        "token_ids": (5, 6, 7, 8, 9, 10),
        "sampled": (Span(start=2, end=4), Span(start=5, end=6)),
        "logprobs": (0.0, 0.0, -1.0, -2.0, 0.0, -3.0),
        "versions": (VersionSpan(version=V1, tokens=2), VersionSpan(version=V2, tokens=1)),
    }
    return Sequence(**given | changes)


def trajectory(reward: float | None = 1.0, **changes: Any) -> Trajectory:
    given: dict[str, Any] = {
        "sequences": (sequence(),),
        "messages": ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}),
        "num_prompt_messages": 1,
        "reward": reward,
        "status": "finished",
    }
    return Trajectory(**given | changes)


def test_a_mask_marks_the_sampled_tokens_and_no_others() -> None:
    assert sequence().mask == [0, 0, 1, 1, 0, 1]
    assert sequence().num_sampled == 3
    assert sequence().steps == [NOT_SAMPLED, NOT_SAMPLED, 1, 1, NOT_SAMPLED, 2]


def test_staleness_counts_sampled_tokens_by_the_steps_since_they_were_sampled() -> None:
    assert sequence().staleness(3) == Counter({2: 2, 1: 1})
    group = Group(row=0, trajectories=(trajectory(), trajectory()))
    assert group.staleness(3) == Counter({2: 4, 1: 2})
    assert group.num_sampled == 6


def test_the_oldest_version_is_the_oldest_of_any_sampled_token() -> None:
    spans = (VersionSpan(version=RESUMED, tokens=2), VersionSpan(version=V2, tokens=1))
    assert sequence(versions=spans).oldest_version == V2  # an earlier attempt is older
    empty = (VersionSpan(version=V1, tokens=0), VersionSpan(version=V2, tokens=3))
    assert sequence(versions=empty).oldest_version == V2
    assert sequence(versions=empty).staleness(2) == Counter({0: 3})
    nothing = Sequence(token_ids=(1,), logprobs=(0.0,))
    assert Group(row=0, trajectories=(trajectory(sequences=(nothing,)),)).oldest_version is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": (0.0, 0.0, -1.0, -2.0, 0.0)}, "6 token ids and 5 logprobs"),
        ({"sampled": (Span(start=2, end=5), Span(start=4, end=5))}, "do not overlap"),
        ({"sampled": (Span(start=5, end=6), Span(start=2, end=4))}, "in order"),
        ({"sampled": (Span(start=2, end=7),)}, "of 6 tokens"),
        ({"logprobs": (-0.5, 0.0, -1.0, -2.0, 0.0, -3.0)}, "tokens 0 to 2, expected 0.0"),
        ({"logprobs": (0.0, 0.0, -1.0, -2.0, -0.5, -3.0)}, "tokens 4 to 5, expected 0.0"),
        ({"logprobs": (0.0, 0.0, -1.0, math.nan, 0.0, -3.0)}, "finite"),
        ({"versions": (VersionSpan(version=V1, tokens=2),)}, "versions of 2 tokens, expected 3"),
    ],
)
def test_a_sequence_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        sequence(**changes)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (2, 2), (3, 2)])
def test_a_span_has_tokens_and_a_token_before_it(start: int, end: int) -> None:
    with pytest.raises(ValidationError):
        Span(start=start, end=end)


def test_spans_may_touch() -> None:
    assert sequence(sampled=(Span(start=2, end=3), Span(start=3, end=4), Span(start=5, end=6))).num_sampled == 3


def test_a_reason_is_given_exactly_if_the_episode_failed() -> None:
    assert trajectory(status="failed", reason="the environment died").in_loss is False
    for status, reason in (("failed", None), ("finished", "done")):
        with pytest.raises(ValidationError, match="expected one exactly if it failed"):
            trajectory(status=status, reason=reason)


def test_the_conversation_is_divided_into_prompt_and_completion() -> None:
    one = trajectory()
    assert [m["content"] for m in one.prompt] == ["?"]
    assert [m["content"] for m in one.completion] == ["!"]
    with pytest.raises(ValidationError, match="expected at least the prompt's 3"):
        trajectory(num_prompt_messages=3)


def test_only_rewards_of_trajectories_in_the_loss_are_a_signal() -> None:
    failed = trajectory(5.0, status="failed", reason="x")
    nothing = trajectory(7.0, sequences=(Sequence(token_ids=(1,), logprobs=(0.0,)),))
    assert not Group(row=0, trajectories=(trajectory(1.0), trajectory(None), failed, nothing)).has_signal
    assert Group(row=0, trajectories=(trajectory(1.0), trajectory(0.0), failed)).has_signal


def test_a_single_turn_is_the_prompt_and_a_sampled_completion() -> None:
    completion = Completion(
        token_ids=(3, 4),
        logprobs=(-0.5, -0.25),
        finish_reason="stop",
        versions=(VersionSpan(version=V1, tokens=2),),
    )
    one = Sequence.of_completion([1, 2], completion)
    assert (one.token_ids, one.mask, one.logprobs) == ((1, 2, 3, 4), [0, 0, 1, 1], (0.0, 0.0, -0.5, -0.25))
    empty = Completion(token_ids=(), logprobs=(), finish_reason="length", versions=())
    assert Sequence.of_completion([1, 2], empty).num_sampled == 0


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LOGPROB = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False)


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    turns = draw(st.lists(st.tuples(st.integers(1, 3), st.lists(LOGPROB, min_size=1, max_size=4)), max_size=4))
    ids: list[int] = []
    logprobs: list[float] = []
    spans: list[Span] = []
    for before, sampled in turns:
        ids += draw(st.lists(st.integers(0, 2**31), min_size=before + len(sampled), max_size=before + len(sampled)))
        logprobs += [0.0] * before + sampled
        spans.append(Span(start=len(ids) - len(sampled), end=len(ids)))
    steps = [VersionSpan(version=Version(draw(st.integers(0, 9)), 1), tokens=span.size) for span in spans]
    return Sequence(token_ids=tuple(ids), sampled=tuple(spans), logprobs=tuple(logprobs), versions=tuple(steps))


@settings(max_examples=50, deadline=None)
@given(st.lists(sequences(), max_size=3), TEXT, st.none() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_group_survives_json_unchanged(some: list[Sequence], text: str, reward: float | None) -> None:
    message = {"role": "assistant", "content": text, "tool_calls": [{"function": {"arguments": {text: [None, 1.5]}}}]}
    one = trajectory(
        sequences=tuple(some),
        messages=(message,),
        rewards={text: reward},
        reward=reward,
        timings=Timings(total_s=0.1, decode_s=1 / 3),
    )
    group = Group(row=3, trajectories=(one,))
    assert Group.model_validate_json(group.model_dump_json()) == group
    assert Group.model_validate(group.model_dump(mode="json")) == group
    for before, after in zip(
        some, Group.model_validate_json(group.model_dump_json()).trajectories[0].sequences, strict=True
    ):
        assert [x.hex() for x in before.logprobs] == [x.hex() for x in after.logprobs]
        assert sum(after.mask) == after.num_sampled == sum(step != NOT_SAMPLED for step in after.steps)
