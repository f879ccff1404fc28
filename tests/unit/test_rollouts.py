"""What is asked for when, and what a resumed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from support.rollouts import completion
from tandem_protocol.messages import Group, RolloutRequest
from tandem_protocol.version import Version
from tandem_trainer.batch import ScoredGroup
from tandem_trainer.config import RolloutConfig
from tandem_trainer.errors import UserError
from tandem_trainer.prompts import PromptCursor, PromptRow
from tandem_trainer.rollouts import Rollouts

ROWS = [PromptRow(i, f"row {i}", str(i), str(i), (i + 1,), {}) for i in range(10)]


class Generator:
    """Answers every prompt at once, with `version`."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []
        self.version = Version(0, 1)

    async def rollouts(self, request: RolloutRequest, on_group: Callable[[Group], object], *, timeout_s: float) -> None:
        self.requests.append(request)
        for i in range(len(request.prompts)):
            on_group(Group(prompt_index=i, completions=(completion([1], version=self.version),) * 2))


class Scorer:
    async def score(self, row: PromptRow, group: Group) -> ScoredGroup:
        if row.index == 9:
            raise UserError("row 9 is bad")
        return ScoredGroup(
            row=row.index,
            prompt_ids=row.token_ids,
            prompt_text=row.text,
            texts=("a", "b"),
            group=group,
            rewards=(0.0, 1.0),
            rewards_by_function={},
        )


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


def _rollouts(portal: BlockingPortal, generator: Any, max_lag: int) -> Rollouts:
    return Rollouts(
        rows=ROWS,
        cursor=PromptCursor(len(ROWS), seed=0, shuffle=False),
        client=generator,
        rewards=Scorer(),  # type: ignore[arg-type]  # only `score` is used
        portal=portal,
        wait=Future.result,
        config=RolloutConfig(num_prompts=2, num_generations=2, max_completion_length=4),
        prompts_a_step=2,
        max_lag=max_lag,
    )


def _rows(groups: list[ScoredGroup]) -> list[int]:
    return [group.row for group in groups]


def test_without_lag_nothing_is_asked_for_before_the_newest_version_serves(portal: BlockingPortal):
    generator = Generator()
    rollouts = _rollouts(portal, generator, max_lag=0)
    rollouts.start(Version(0, 3))
    assert generator.requests == []
    assert _rows(rollouts.next(0)) == [0, 1]
    assert len(generator.requests) == 1
    assert _rows(rollouts.next(1)) == [2, 3]
    assert [request.min_version for request in generator.requests] == [Version(0, 3), Version(1, 3)]


def test_with_lag_k_so_many_steps_are_under_way_and_none_may_be_older_than_k_when_trained_on(portal: BlockingPortal):
    generator, lag = Generator(), 2
    rollouts = _rollouts(portal, generator, max_lag=lag)
    rollouts.start(Version(0, 1))
    for step in range(4):
        assert _rows(rollouts.next(step - lag)) == [2 * step, 2 * step + 1]
    rollouts.close()
    portal.call(_settle)
    assert [request.min_version.step for request in generator.requests] == [0, 0, 0, 1, 2, 3]


async def _settle() -> None:
    """Let the portal's tasks that were started before this one run."""


def test_resume_keeps_what_was_scored_and_asks_again_with_the_same_seeds_for_the_rest(portal: BlockingPortal):
    generator = Generator()
    rollouts = _rollouts(portal, generator, max_lag=1)
    rollouts.start(Version(0, 1))
    rollouts.next(-1)
    portal.call(_settle)
    state = rollouts.state_dict()
    asked = generator.requests[1]
    del state["queue"][0]["scored"][1]

    again = Generator()
    resumed = _rollouts(portal, again, max_lag=1)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    resumed.start(Version(1, 2))
    assert _rows(resumed.next(0)) == [2, 3]
    assert again.requests[0].prompts == asked.prompts[1:]
    assert again.requests[0].min_version == Version(1, 2)
    assert _rows(resumed.next(1)) == [4, 5]


def test_resume_with_less_lag_asks_again_for_what_has_grown_too_old(portal: BlockingPortal):
    generator = Generator()
    rollouts = _rollouts(portal, generator, max_lag=1)
    rollouts.start(Version(0, 1))
    rollouts.next(-1)
    portal.call(_settle)
    state = rollouts.state_dict()

    again = Generator()
    again.version = Version(1, 2)
    resumed = _rollouts(portal, again, max_lag=0)
    resumed.load_state_dict(state)
    resumed.start(Version(1, 2))
    groups = resumed.next(1)
    assert _rows(groups) == [2, 3]
    assert {group.oldest_step for group in groups} == {1}


def test_a_reward_that_fails_ends_the_wait(portal: BlockingPortal):
    rollouts = _rollouts(portal, Generator(), max_lag=0)
    for step in range(4):
        rollouts.next(step)
    with pytest.raises(UserError, match="row 9 is bad"):
        rollouts.next(4)
