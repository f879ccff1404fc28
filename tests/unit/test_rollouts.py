"""Which rollouts are requested when, and what a resumed run reuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from support.models import make_tokenizer
from support.rollouts import completion, sequence, trajectory
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.errors import TandemError
from tandem_protocol.messages import Group as Answer
from tandem_protocol.messages import RolloutRequest
from tandem_protocol.version import Version
from tandem_rollout.completions import CompletionReader
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.sampler import Sampler
from tandem_rollout.trajectory import Group, Trajectory

READER = CompletionReader(make_tokenizer())
ROWS = [PromptRow(i, f"row {i}", str(i), str(i), (i + 1,), {}) for i in range(10)]


class Generator:
    """Answers every prompt immediately with samples of `version`, or of the version that the request needs."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []
        self.version = Version(0, 1)

    async def rollouts(
        self, request: RolloutRequest, on_group: Callable[[Answer], object], *, timeout_s: float
    ) -> None:
        self.requests.append(request)
        version = max(self.version, request.min_version or self.version)
        for i in range(len(request.prompts)):
            on_group(Answer(prompt_index=i, completions=(completion([1], version=version),) * 2))


class Scorer:
    def __init__(self, reward: float = 0.0, *, bad_row: int | None = None) -> None:
        self.reward, self.bad_row, self.scored = reward, bad_row, 0

    async def score(self, row: PromptRow, trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
        if row.index == self.bad_row:
            raise UserError(f"row {self.bad_row} is bad")
        self.scored += 1
        pairs = zip(trajectories, (self.reward, 1.0), strict=True)
        return tuple(one.model_copy(update={"reward": reward}) for one, reward in pairs)


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


def _rollouts(
    portal: BlockingPortal,
    generator: Any,
    max_lag: int,
    *,
    scorer: Any = None,
    rows: list[PromptRow] = ROWS,
    until_served: Any = None,
) -> Rollouts:
    return Rollouts(
        rows=rows,
        cursor=PromptCursor(len(ROWS), seed=0, shuffle=False),
        sampler=Sampler(generator, READER, scorer or Scorer()),  # type: ignore[arg-type]  # scores without functions
        portal=portal,
        wait=Future.result,
        config=RolloutConfig(num_prompts=2, num_generations=2, max_completion_length=4),
        prompts_per_step=2,
        max_lag=max_lag,
        until_served=until_served,
    )


def _rows(groups: list[Group]) -> list[int]:
    return [group.row for group in groups]


def test_without_lag_rollouts_are_requested_after_the_newest_version_is_served(portal: BlockingPortal):
    generator = Generator()
    rollouts = _rollouts(portal, generator, max_lag=0)
    rollouts.start(Version(0, 3))
    assert generator.requests == []
    assert _rows(rollouts.next(0)) == [0, 1]
    assert len(generator.requests) == 1
    assert _rows(rollouts.next(1)) == [2, 3]
    assert [request.min_version for request in generator.requests] == [Version(0, 3), Version(1, 3)]


def test_the_deadline_of_a_request_begins_when_its_version_is_served(portal: BlockingPortal):
    generator, waited = Generator(), []
    is_served = portal.call(asyncio.Event)

    async def until_served(version: Version) -> None:
        waited.append(version)
        await is_served.wait()

    rollouts = _rollouts(portal, generator, max_lag=1, until_served=until_served)
    rollouts.start(Version(3, 2))
    step = portal.start_task_soon(rollouts._next, 3)
    portal.call(_passed, waited)
    assert waited == [Version(3, 2)] * 4
    assert generator.requests == [], "a request has a deadline"
    portal.call(is_served.set)
    assert len(step.result(60)) == 2
    assert {request.min_version for request in generator.requests} == {Version(3, 2)}


async def _passed(waited: list[Version]) -> None:
    async with asyncio.timeout(60):
        while len(waited) < 4:  # noqa: ASYNC110 - the queue has no event for it
            await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)


def test_lag_k_keeps_k_more_steps_in_progress_and_no_rollout_becomes_older_than_k(portal: BlockingPortal):
    generator, lag = Generator(), 2
    rollouts = _rollouts(portal, generator, max_lag=lag)
    rollouts.start(Version(0, 1))
    for step in range(4):
        assert _rows(rollouts.next(step - lag)) == [2 * step, 2 * step + 1]
    rollouts.close()
    portal.call(_settle)
    steps = [request.min_version.step for request in generator.requests if request.min_version]
    assert steps == [0] * 6 + [1] * 2 + [2] * 2 + [3] * 2


def _finish(rollouts: Rollouts) -> None:
    """End the step, and wait for all requests in progress."""
    rollouts.learned()
    rollouts._portal.call(_ended, rollouts)


async def _ended(rollouts: Rollouts) -> None:
    await asyncio.gather(*(slot.task for slot in rollouts._pool.slots if slot.task))


async def _settle() -> None:
    """Let tasks run that were started on the portal before this one."""


def test_resume_keeps_scored_groups_and_requests_the_rest_with_the_same_seeds(portal: BlockingPortal):
    generator = Generator()
    rollouts = _rollouts(portal, generator, max_lag=1)
    rollouts.start(Version(0, 1))
    rollouts.next(-1)
    _finish(rollouts)
    state = rollouts.state_dict()
    requested = [request.prompts for request in generator.requests]
    del state["queue"][0]["scored"][1]

    again = Generator()
    resumed = _rollouts(portal, again, max_lag=1)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    resumed.start(Version(1, 2))
    assert _rows(resumed.next(0)) == [2, 3]
    assert again.requests[0].prompts == requested[3]
    assert again.requests[0].min_version == Version(1, 2)
    assert _rows(resumed.next(1)) == [4, 5]


def test_resume_with_less_lag_requests_too_old_groups_again(portal: BlockingPortal):
    generator = Generator()
    rollouts = _rollouts(portal, generator, max_lag=1)
    rollouts.start(Version(0, 1))
    rollouts.next(-1)
    _finish(rollouts)
    state = rollouts.state_dict()

    again = Generator()
    again.version = Version(1, 2)
    resumed = _rollouts(portal, again, max_lag=0)
    resumed.load_state_dict(state)
    resumed.start(Version(1, 2))
    groups = resumed.next(1)
    assert _rows(groups) == [2, 3]
    assert {group.lag(1) for group in groups} == {0}


def _queue_of_two_steps(portal: BlockingPortal) -> dict[str, Any]:
    """The state after step 0 with lag 2: rows 2 to 5 are sampled and scored, with the reward 0.0."""
    rollouts = _rollouts(portal, Generator(), max_lag=2)
    rollouts.start(Version(0, 1))
    rollouts.next(-2)
    _finish(rollouts)
    return json.loads(json.dumps(rollouts.state_dict()))  # as it is read from a checkpoint


def _resumed(
    portal: BlockingPortal, state: dict[str, Any], rows: list[PromptRow] = ROWS, **again: bool
) -> tuple[Rollouts, Generator, Scorer]:
    generator, scorer = Generator(), Scorer(reward=0.25)
    rollouts = _rollouts(portal, generator, max_lag=2, scorer=scorer, rows=rows)
    rollouts.load_state_dict(state, **again)
    rollouts.start(Version(0, 2))
    return rollouts, generator, scorer


def _requested_rows(generator: Generator) -> list[int]:
    """The requested rows. Each prompt has one token, which identifies its row."""
    return [prompt.token_ids[0] - 1 for request in generator.requests for prompt in request.prompts]


def test_resume_with_the_same_rewards_does_not_score_again(portal: BlockingPortal):
    rollouts, generator, scorer = _resumed(portal, _queue_of_two_steps(portal))
    assert [group.rewards for group in rollouts.next(-1)] == [(0.0, 1.0)] * 2
    _finish(rollouts)
    assert (_requested_rows(generator), scorer.scored) == ([6, 7], 2)


def test_resume_with_other_rewards_scores_samples_again(portal: BlockingPortal):
    rollouts, generator, _ = _resumed(portal, _queue_of_two_steps(portal), score_again=True)
    for step, rows in [(1, [2, 3]), (2, [4, 5])]:
        groups = rollouts.next(step - 2)
        assert _rows(groups) == rows
        assert [group.rewards for group in groups] == [(0.25, 1.0)] * 2
    assert not {2, 3, 4, 5} & {*_requested_rows(generator)}, "samples are not requested again"


def test_a_run_that_ends_before_it_has_scored_its_samples_again_keeps_them(portal: BlockingPortal):
    stopped, _, _ = _resumed(portal, _queue_of_two_steps(portal), score_again=True)
    state = json.loads(json.dumps(stopped.state_dict()))  # the checkpoint has the new settings now
    rollouts, generator, _ = _resumed(portal, state)
    for step, rows in [(1, [2, 3]), (2, [4, 5])]:
        groups = rollouts.next(step - 2)
        assert _rows(groups) == rows
        assert [group.rewards for group in groups] == [(0.25, 1.0)] * 2
    assert not {2, 3, 4, 5} & {*_requested_rows(generator)}, "samples are not requested again"


def test_a_run_that_ends_while_it_scores_its_samples_again_keeps_them(portal: BlockingPortal):
    class Endless(Scorer):
        async def score(self, row: PromptRow, trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
            if row.index in (4, 5):
                await asyncio.Event().wait()
            return await super().score(row, trajectories)

    stopped = _rollouts(portal, Generator(), max_lag=2, scorer=Endless(reward=0.25))
    stopped.load_state_dict(_queue_of_two_steps(portal), score_again=True)
    stopped.start(Version(0, 2))
    assert _rows(stopped.next(-1)) == [2, 3]
    state = json.loads(json.dumps(stopped.state_dict()))
    stopped.close()
    rollouts, generator, _ = _resumed(portal, state)
    assert _rows(rollouts.next(-1)) == [2, 3]
    assert _rows(rollouts.next(0)) == [4, 5]
    assert not {2, 3, 4, 5} & {*_requested_rows(generator)}, "samples are not requested again"


def test_resume_with_other_sampling_requests_everything_again(portal: BlockingPortal):
    state = _queue_of_two_steps(portal)
    both: tuple[dict[str, Any], ...] = ({"sample_again": True}, {"sample_again": True, "score_again": True})
    for again in both:
        rollouts, generator, _ = _resumed(portal, state, **again)
        assert _rows(rollouts.next(-1)) == [2, 3]
        _finish(rollouts)
        assert _requested_rows(generator) == [2, 3, 4, 5, 6, 7]


def test_resume_with_an_edited_prompt_requests_it_again(portal: BlockingPortal):
    edited = [*ROWS]
    edited[3] = PromptRow(3, "row 3", "other", "other", (77,), {})
    rollouts, generator, _ = _resumed(portal, _queue_of_two_steps(portal), rows=edited, score_again=True)
    groups = {group.row: group for step in (1, 2) for group in rollouts.next(step - 2)}
    assert [*groups] == [2, 4, 3, 5], "what was sampled before the edit is older, and comes first"
    assert groups[3].trajectories[0].sequences[0].token_ids == (77, 1)
    assert _requested_rows(generator)[:1] == [76]


def test_resume_keeps_episodes_of_several_turns_and_sequences(portal: BlockingPortal):
    state = _queue_of_two_steps(portal)
    episode = trajectory(
        [sequence([([3], [5, 6]), ([7], [8])]), sequence([([3], [9])])],
        0.5,
        rewards={"Game": 0.5},
        turns=3,
        tool_calls=1,
    )
    failed = trajectory([], status="failed", reason="broke")
    saved = Group(row=2, trajectories=(episode, failed))
    state["queue"][0]["scored"]["0"] = saved.model_dump(mode="json")
    rollouts, _, _ = _resumed(portal, json.loads(json.dumps(state)))
    assert rollouts.next(-1)[0] == saved


def test_samples_that_are_scored_again_lose_their_old_rewards(portal: BlockingPortal):
    state = _queue_of_two_steps(portal)
    for scored in state["queue"][0]["scored"].values():
        for one in scored["trajectories"]:
            one["rewards"] = {"rewards:removed": 3.0}
    rollouts, _, _ = _resumed(portal, state, score_again=True)
    assert [one.rewards for group in rollouts.next(-1) for one in group.trajectories] == [{}] * 4


def test_forgotten_samples_are_requested_again(portal: BlockingPortal):
    rollouts, _, _ = _resumed(portal, _queue_of_two_steps(portal))
    rollouts.forget_samples()
    resumed, generator, _ = _resumed(portal, json.loads(json.dumps(rollouts.state_dict())))
    assert _rows(resumed.next(-1)) == [2, 3]
    assert _requested_rows(generator)[:2] == [2, 3]


def test_resume_with_less_lag_requests_the_end_of_a_longer_queue_later(portal: BlockingPortal):
    state, generator = _queue_of_two_steps(portal), Generator()
    resumed = _rollouts(portal, generator, max_lag=0)
    resumed.load_state_dict(state)
    resumed.start(Version(1, 2))
    generator.version = Version(1, 2)
    assert _rows(resumed.next(1)) == [2, 3]
    resumed.learned()
    assert [slot.task for slot in resumed._pool.slots] == [None, None]
    assert [request.min_version for request in generator.requests] == [Version(1, 2)]


def test_a_reward_that_fails_ends_the_wait(portal: BlockingPortal):
    rollouts = _rollouts(portal, Generator(), max_lag=0, scorer=Scorer(bad_row=9))
    rollouts.start(Version(0, 1))
    for step in range(4):
        rollouts.next(step)
    with pytest.raises(UserError, match="row 9 is bad"):
        rollouts.next(4)


def test_a_version_of_another_trainer_ends_the_run(portal: BlockingPortal):
    generator = Generator()
    generator.version = Version(2, 9)
    rollouts = _rollouts(portal, generator, max_lag=1)
    rollouts.start(Version(0, 1))
    with pytest.raises(TandemError, match=r"got tokens of version 2.9, expected step 3 .* Another trainer"):
        rollouts.next(2)
