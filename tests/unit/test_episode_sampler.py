"""Episodes in the queue: seeds, versions, deadlines, rewards, and what a resumed run asks for again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from support.episodes import bpe_tokenizer, called, completion
from support.play import Made, Scripted, loops, player
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.messages import Group as Answer
from tandem_protocol.messages import Prompt, RolloutRequest, Sampling
from tandem_protocol.version import Version
from tandem_rollout.environments import Environments, Start
from tandem_rollout.episode_sampler import EpisodeSampler
from tandem_rollout.prompts import PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.rewards.judge import Judge
from tandem_rollout.rewards.scoring import Rewards
from tandem_rollout.trajectory import Group, Trajectory
from tandem_rollout.turn_sampler import turn_seed

ROWS = [PromptRow(i, f"row {i}", [{"role": "user", "content": f"Add {i}."}], "", (i + 1,), {}) for i in range(6)]


class Generator:
    """Calls the tool `add` in the first turn, and ends the episode in the second."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []

    async def rollouts(
        self, request: RolloutRequest, on_group: Callable[[Answer], object], *, timeout_s: float
    ) -> None:
        self.requests.append(request)
        (prompt,) = request.prompts
        asked = bpe_tokenizer().decode(prompt.token_ids)
        text = "Done." if "<tool_response>" in asked else called("add", a=1, b=2)
        end = bpe_tokenizer().convert_tokens_to_ids("<|im_end|>")
        ids = [*bpe_tokenizer()(text, add_special_tokens=False).input_ids, end]
        version = request.min_version.step if request.min_version else 0
        on_group(Answer(prompt_index=0, completions=(completion(ids, step=version),)))


class Scorer:
    async def score(
        self, row: PromptRow, trajectories: Sequence[Trajectory], environments: Sequence[Any] = ()
    ) -> tuple[Trajectory, ...]:
        return tuple(one.model_copy(update={"reward": float(i)}) for i, one in enumerate(trajectories))


def sampler(generator: Any, scorer: Any = None, environments: Environments | None = None) -> EpisodeSampler:
    environments = environments or loops()
    play = partial(player(environments).play_group, environments)
    return EpisodeSampler(generator, play, scorer or Scorer())


def request(rows: Sequence[PromptRow], *seeds: int | None, n: int = 2) -> RolloutRequest:
    prompts = tuple(Prompt(token_ids=row.token_ids, seed=seed) for row, seed in zip(rows, seeds, strict=True))
    return RolloutRequest(prompts=prompts, sampling=Sampling(n=n, max_tokens=500), min_version=Version(3, 1))


async def collected(
    one: EpisodeSampler, asked: RolloutRequest, rows: Sequence[PromptRow], timeout_s: float = 20
) -> Any:
    groups: dict[int, Group] = {}
    await one.collect(asked, rows, groups.__setitem__, timeout_s=timeout_s)
    return groups


async def test_every_turn_has_its_own_seed_and_the_version_of_the_request() -> None:
    generator = Generator()
    groups = await collected(sampler(generator), request(ROWS[:2], 100, 200), ROWS[:2])
    assert sorted(groups) == [0, 1]
    assert [[t.turns for t in group.trajectories] for group in groups.values()] == [[2, 2]] * 2
    asked = [(one.prompts[0].seed, one.min_version, one.sampling.n) for one in generator.requests]
    seeds = [seed for base in (100, 101, 200, 201) for seed in (base, turn_seed(base, 1))]
    assert sorted(asked, key=str) == sorted([(seed, Version(3, 1), 1) for seed in seeds], key=str)


async def test_a_greedy_evaluation_has_no_seeds() -> None:
    generator = Generator()
    await collected(sampler(generator), request(ROWS[:1], None, n=1), ROWS[:1])
    assert [one.prompts[0].seed for one in generator.requests] == [None, None]


async def test_episodes_that_are_not_over_in_time_end_the_wait() -> None:
    class Hangs(Scripted):
        async def reset(self, row: Any) -> Start:
            await asyncio.sleep(60)
            raise AssertionError

    environments = Made(Hangs)
    with pytest.raises(
        TimeoutError, match=r"the episodes of 1 of 1 rows are not over after 0.1 s, such as those of row 0"
    ):
        await collected(sampler(Generator(), environments=environments), request(ROWS[:1], 1), ROWS[:1], timeout_s=0.1)
    assert [one.closed for one in environments.environments] == [[True]] * 2


async def test_rewards_have_a_deadline_of_their_own() -> None:
    class Slow(Scorer):
        async def score(self, *_: Any) -> Any:
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError, match=r"1 of 1 groups are not scored 0.5 s after their episodes"):
        await collected(sampler(Generator(), Slow()), request(ROWS[:1], 1), ROWS[:1], timeout_s=0.5)


def finish(rollouts: Rollouts) -> None:
    rollouts.learned()
    rollouts._portal.call(ended, rollouts)


async def ended(rollouts: Rollouts) -> None:
    await asyncio.gather(*(slot.task for slot in rollouts._pool.slots if slot.task))


def queue(portal: Any, generator: Any, scorer: Any = None) -> Rollouts:
    return Rollouts(
        rows=ROWS,
        cursor=PromptCursor(len(ROWS), seed=0, shuffle=False),
        sampler=sampler(generator, scorer),
        portal=portal,
        wait=Future.result,
        config=RolloutConfig(num_prompts=2, num_generations=2, tools=("tools:add",)),
        prompts_per_step=2,
        max_lag=1,
    )


def asked_rows(generator: Generator) -> set[int]:
    texts = [bpe_tokenizer().decode(one.prompts[0].token_ids) for one in generator.requests]
    return {row.index for row in ROWS if any(f"Add {row.index}." in text for text in texts)}


@pytest.mark.parametrize(
    ("again", "rows"),
    [({}, {4, 5}), ({"score_again": True}, {2, 3, 4, 5}), ({"sample_again": True}, {2, 3, 4, 5})],
    ids=["nothing", "rewards", "sampling"],
)
def test_after_a_change_of_rewards_episodes_are_played_again(again: dict[str, bool], rows: set[int]) -> None:
    """The checkpoint has the groups of the rows 2 and 3. Those of 4 and 5 are asked for next."""
    with start_blocking_portal() as portal:
        rollouts = queue(portal, Generator())
        rollouts.start(Version(0, 1))
        rollouts.next(-1)
        finish(rollouts)
        generator = Generator()
        resumed = queue(portal, generator)
        resumed.load_state_dict(rollouts.state_dict(), **again)
        resumed.start(Version(0, 2))
        assert [group.row for group in resumed.next(0)] == [2, 3]
        finish(resumed)
    assert asked_rows(generator) == rows


async def test_a_judge_decides_alone_and_the_environments_rewards_are_reported(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judges_of_episodes.py").write_text("def first(completions, **_): return [0 for _ in completions]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = Judge("judges_of_episodes:first", drop_errors=False, timeout_s=5)
    environments = Made(Scripted)
    groups = await collected(sampler(Generator(), judge, environments), request(ROWS[:1], 1), ROWS[:1])
    name = "judges_of_episodes:first"
    given = [(one.reward, one.rewards) for one in groups[0].trajectories]
    assert given == [(1.0, {"own": 1.0, "other": None, name: 1.0}), (0.0, {"own": 1.0, "other": None, name: 0.0})]


async def test_without_reward_functions_the_environments_own_rewards_count() -> None:
    rewards = Rewards((), drop_errors=False, timeout_s=5)
    groups = await collected(sampler(Generator(), rewards, Made(Scripted)), request(ROWS[:1], 1), ROWS[:1])
    assert groups[0].rewards == (1.0, 1.0)
