"""Build completions, trajectories and groups for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem_protocol.messages import Completion, VersionSpan
from tandem_protocol.messages import Group as Answer
from tandem_protocol.version import Version
from tandem_rollout.completions import CompletionReader
from tandem_rollout.prompts import PromptRow
from tandem_rollout.trajectory import Group, Span, Trajectory
from tandem_rollout.trajectory import Sequence as TokenSequence

V0 = Version(0, 1)
REWARD = "rewards:r"


def completion(token_ids: Sequence[int], *, finish: str = "stop", version: Version = V0) -> Completion:
    """Return a completion with the logprobs -0.5, -1.0, -1.5 …"""
    return Completion(
        token_ids=tuple(token_ids),
        logprobs=tuple(-0.5 * (i + 1) for i in range(len(token_ids))),
        finish_reason=finish,
        versions=(VersionSpan(version=version, tokens=len(token_ids)),),
    )


def answer(completions: Sequence[Completion], index: int = 0) -> Answer:
    """Return a group of the wire contract."""
    return Answer(prompt_index=index, completions=tuple(completions))


def sequence(turns: Sequence[tuple[Sequence[int], Sequence[int]]], *, version: Version = V0) -> TokenSequence:
    """Return a sequence of turns, each given as the tokens before it and its sampled tokens.

    The sampled tokens have the logprobs -0.5, -1.0, -1.5 …
    """
    token_ids: list[int] = []
    logprobs: list[float] = []
    spans = []
    for before, sampled in turns:
        start = len(token_ids) + len(before)
        spans.append(Span(start=start, end=start + len(sampled)))
        count = sum(span.size for span in spans[:-1])
        token_ids += [*before, *sampled]
        logprobs += [0.0] * len(before) + [-0.5 * (count + i + 1) for i in range(len(sampled))]
    return TokenSequence(
        token_ids=tuple(token_ids),
        sampled=tuple(spans),
        logprobs=tuple(logprobs),
        versions=(VersionSpan(version=version, tokens=sum(span.size for span in spans)),),
    )


def trajectory(sequences: Sequence[TokenSequence], reward: float | None = None, **changes: Any) -> Trajectory:
    """Return a trajectory whose completion is the text of its sampled tokens' ids."""
    ids = " ".join(str(token) for one in sequences for token in one.sampled_ids)
    given: dict[str, Any] = {
        "sequences": tuple(sequences),
        "messages": ({"role": "user", "content": "prompt"}, {"role": "assistant", "content": ids}),
        "num_prompt_messages": 1,
        "reward": reward,
        "rewards": {REWARD: reward},
        "status": "finished",
        "turns": 1,
    }
    return Trajectory(**given | changes)


def single_turn(prompt_ids: Sequence[int], one: Completion, reward: float | None = None, **changes: Any) -> Trajectory:
    """Return the trajectory of a completion."""
    status = "finished" if one.finish_reason == "stop" else "max_tokens"
    return trajectory([TokenSequence.of_completion(prompt_ids, one)], reward, **{"status": status} | changes)


def scored(
    prompt_ids: Sequence[int], completions: Sequence[Completion], rewards: Sequence[float | None], *, row: int = 0
) -> Group:
    """Return a group of single turns with rewards."""
    pairs = zip(completions, rewards, strict=True)
    return Group(row=row, trajectories=tuple(single_turn(prompt_ids, one, reward) for one, reward in pairs))


def with_rewards(group: Group, **columns: Sequence[float | None]) -> Group:
    """Replace the rewards by name. The total rewards stay the same."""
    trajectories = [
        one.model_copy(update={"rewards": {name: column[i] for name, column in columns.items()}})
        for i, one in enumerate(group.trajectories)
    ]
    return group.model_copy(update={"trajectories": tuple(trajectories)})


def read(tokenizer: Any, row: PromptRow, completions: Sequence[Completion]) -> tuple[Trajectory, ...]:
    """Return the trajectories of the row's completions, without rewards."""
    return CompletionReader(tokenizer)(row, answer(completions))


def rewards_of(trajectories: Sequence[Trajectory]) -> tuple[float | None, ...]:
    return tuple(one.reward for one in trajectories)


def rewards_by_name(trajectories: Sequence[Trajectory]) -> dict[str, tuple[float | None, ...]]:
    return {name: tuple(one.rewards[name] for one in trajectories) for name in trajectories[0].rewards}
