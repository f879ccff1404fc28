"""Build completions and groups for tests."""

from __future__ import annotations

from collections.abc import Sequence

from tandem_protocol.messages import Completion, Group, VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.scored_group import ScoredGroup

V0 = Version(0, 1)


def completion(token_ids: Sequence[int], *, finish: str = "stop", version: Version = V0) -> Completion:
    """Return a completion with the logprobs -0.5, -1.0, -1.5 …"""
    return Completion(
        token_ids=tuple(token_ids),
        logprobs=tuple(-0.5 * (i + 1) for i in range(len(token_ids))),
        finish_reason=finish,  # type: ignore[arg-type]  # pydantic checks it
        versions=(VersionSpan(version=version, tokens=len(token_ids)),),
    )


def group(completions: Sequence[Completion], index: int = 0) -> Group:
    return Group(prompt_index=index, completions=tuple(completions))


def scored(
    prompt_ids: Sequence[int], completions: Sequence[Completion], rewards: Sequence[float | None], *, row: int = 0
) -> ScoredGroup:
    return ScoredGroup(
        row=row,
        prompt_ids=tuple(prompt_ids),
        prompt_text="prompt",
        texts=tuple(f"text {i}" for i in range(len(completions))),
        group=group(completions),
        rewards=tuple(rewards),
        rewards_by_function={"rewards:r": tuple(rewards)},
    )
