"""Episodes on the mock engine: every logprob that the learner gets is the policy's, also across switches of weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from support.episodes import Row, bpe_tokenizer, renderer
from support.mock_engine import SAMPLING, TEMPLATE, Engine, assert_logprobs_are_the_policys
from tandem_protocol.messages import Group, RolloutRequest
from tandem_protocol.version import Version
from tandem_rollout.environments import ClassEnvironments
from tandem_rollout.episode import Limits, Player
from tandem_rollout.trajectory import Trajectory
from tandem_rollout.turn_sampler import TurnSampler, turn_seed
from tandem_rollout.turns import TurnReader


class Chat:
    """It always has something to say. Before the second turn it switches the weights."""

    switch: Callable[[int], Any] | None = None

    def reset(self, **columns: Any) -> str:
        self.turns = 0
        return "Hi."

    async def step(self, message: Mapping[str, Any]) -> str:
        self.turns += 1
        if self.switch and self.turns == 1:
            await self.switch(1)
        return f"Go on, {self.turns}: {message['content'][:5]}"


async def play(generators: Engine, sampler: Any, environment: Any = Chat, **limits: int) -> Trajectory:
    environments = ClassEnvironments(environment, timeout_s=5, max_characters=100)
    await environments.start()
    one = renderer("", chat_template=TEMPLATE, end_of_turn="<pad>")
    given = {"max_tokens": 400, "max_turns": 4} | limits
    player = Player(one, TurnReader(bpe_tokenizer(), one), Limits(**given))
    group = await player.play_group(environments, Row(None), 0, [sampler])
    return group.trajectories[0]


def sampler(generators: Engine, seed: int, min_version: Version | None = None) -> TurnSampler:
    return TurnSampler(generators, SAMPLING, seed=seed, min_version=min_version, timeout_s=20)


async def test_every_logprob_is_the_policys_given_all_tokens_before_it() -> None:
    for seed in range(20):
        generators = Engine()
        trajectory = await play(generators, sampler(generators, seed))
        assert len(trajectory.sequences) == 1
        assert trajectory.turns > 1 or trajectory.status == "max_tokens"
        assert_logprobs_are_the_policys(trajectory)


async def test_a_switch_between_turns_is_stamped_on_the_tokens_after_it() -> None:
    generators = Engine()
    switching = type("Switching", (Chat,), {"switch": staticmethod(generators.switch)})
    trajectory = await play(generators, sampler(generators, 1), switching)
    assert_logprobs_are_the_policys(trajectory)
    (sequence,) = trajectory.sequences
    for number, span in enumerate(sequence.sampled):
        assert set(sequence.steps[span.start : span.end]) == {min(number, 1)}
    assert trajectory.staleness(1).keys() == {0, 1}


async def test_a_switch_within_a_turn_is_stamped_from_the_token_on() -> None:
    generators = Engine(token_latency_s=0.002)

    async def switches() -> None:
        for step in range(1, 200):
            await asyncio.sleep(0.01)
            await generators.switch(step)

    switching = asyncio.create_task(switches())
    trajectory = await play(generators, sampler(generators, 3))
    switching.cancel()
    assert_logprobs_are_the_policys(trajectory)
    assert any(
        len(set(sequence.steps[span.start : span.end])) > 1
        for sequence in trajectory.sequences
        for span in sequence.sampled
    )


async def test_an_episode_is_repeatable_and_its_first_turn_is_that_of_a_request_for_the_group() -> None:
    generators = Engine()
    once, again = [await play(generators, sampler(generators, 7)) for _ in range(2)]
    assert once.sequences == again.sequences
    first = once.sequences[0].sampled[0]
    request = RolloutRequest.model_validate(
        {
            "prompts": [{"token_ids": once.sequences[0].token_ids[: first.start], "seed": 5}],
            "sampling": SAMPLING.model_copy(update={"n": 4, "max_tokens": 400}),
        }
    )
    groups: list[Group] = []
    await generators.rollouts(request, groups.append, timeout_s=5)
    assert groups[0].completions[2].token_ids == once.sequences[0].token_ids[first.start : first.end]


@pytest.mark.parametrize("seed", [0, 1, 2**61])
def test_the_seeds_of_turns_differ_and_are_accepted(seed: int) -> None:
    seeds = [turn_seed(seed + episode, turn) for episode in range(20) for turn in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= one < 2**62 for one in seeds)
