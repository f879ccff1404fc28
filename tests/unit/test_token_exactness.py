"""The learner trains on exactly the tokens that the generator saw and sampled, in 500 random episodes of several turns.

test_recorder.py tries what the recorder does at each boundary. Here, nothing between the request to the generator and
the learner's tensors is replaced: sampler, reader of turns, environment, chat template, recorder and batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest

from support.episodes import bpe_tokenizer
from support.random_episodes import TEMPLATES, Forks, Generator, environments, play
from support.rollouts import trajectory
from tandem_rollout.trajectory import NOT_SAMPLED, Trajectory
from tandem_trainer.batch import pad, rows_of

EPISODES = 24
"""In an environment, for each of 8 templates and 2 histories: 384."""
FORKS = 8
"""With an agent: 128."""


class Trained(NamedTuple):
    """Consecutive tokens that the learner trains on."""

    before: tuple[int, ...]
    """All tokens before them."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    steps: tuple[int, ...]


def saw(generator: Generator) -> list[Trained]:
    """What the generator saw and sampled."""
    return [
        Trained(
            prompt,
            answer.token_ids,
            answer.logprobs,
            tuple(span.version.step for span in answer.versions for _ in range(span.tokens)),
        )
        for prompt, answer in generator.calls
    ]


def trained(one: Trajectory) -> list[Trained]:
    """What the learner's tensors contain. Where nothing was sampled, they must say so."""
    batch = pad(rows_of(one, 1.0), trajectory_total=1, token_total=one.num_sampled)
    found = []
    for row, (start, end) in enumerate(zip(batch.starts_B.tolist(), batch.ends_B.tolist(), strict=True)):
        ids, width = batch.token_ids_BS[row, :end].tolist(), end - start
        mask, logprobs, steps = (
            values_BT[row, :width].tolist()
            for values_BT in (batch.sampled_mask_BT, batch.sampler_logprobs_BT, batch.sampled_at_BT)
        )
        assert mask == [bool(in_loss) for in_loss in batch.mask_BT[row, :width].tolist()]
        assert not batch.sampled_mask_BT[row, width:].any()
        for place, is_sampled in enumerate(mask):
            assert is_sampled or (logprobs[place], steps[place]) == (0.0, NOT_SAMPLED)
        for first, last in _runs(mask):
            at = slice(start + first, start + last)
            of_run = tuple(logprobs[first:last]), tuple(steps[first:last])
            found.append(Trained(tuple(ids[: at.start]), tuple(ids[at]), *of_run))
    return found


def _runs(mask: Iterable[bool]) -> list[tuple[int, int]]:
    edges = [place for place, (a, b) in enumerate(zip([False, *mask], [*mask, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("history", ["keep", "template"])
@pytest.mark.parametrize("template", TEMPLATES)
async def test_the_learner_trains_on_the_tokens_that_the_generator_saw(template: str, history: Any) -> None:
    made = await environments(template)
    odd = turns = 0
    for seed in range(EPISODES):
        one, generator = await play(template, made, seed, history)
        assert one.reason is None
        assert sorted(trained(one)) == sorted(saw(generator)), seed
        last_prompt, last = generator.calls[-1]
        assert one.sequences[-1].token_ids == last_prompt + last.token_ids
        if history == "keep":
            assert len(one.sequences) == 1, seed
        odd += sum(retokenized(answer.token_ids) != answer.token_ids for _, answer in generator.calls)
        turns += len(generator.calls)
    await made.close()
    assert turns > 2 * EPISODES
    assert odd > turns / 4  # a second tokenization would be noticed


def retokenized(ids: tuple[int, ...]) -> tuple[int, ...]:
    text = bpe_tokenizer().decode(list(ids), skip_special_tokens=False)
    return tuple(bpe_tokenizer()(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("history", ["keep", "template"])
@pytest.mark.parametrize("template", TEMPLATES)
async def test_forked_conversations_train_each_sampled_token_once(template: str, history: Any) -> None:
    for seed in range(FORKS):
        forks = Forks(template, seed, history)
        one = trajectory(await forks.play(6), 1.0)
        assert sorted(trained(one)) == sorted(saw(forks.generator)), seed
        assert one.num_sampled == sum(len(answer.token_ids) for _, answer in forks.generator.calls)
