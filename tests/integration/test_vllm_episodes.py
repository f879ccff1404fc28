"""Episodes of several turns with the real vLLM engine: the trainer sees what the generator sampled, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from support.episode_projects import TOOLS, settings, with_code
from support.episodes import Row, renderer
from support.generators import TOKEN, Generator, running
from support.models import CHAT_TEMPLATE, make_tiny_model, make_tokenizer
from support.projects import Project
from support.reference_policy import ReferencePolicy
from tandem_protocol.messages import Completion, Sampling, SetWeights, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.agents import AgentClient, Agents, plain_messages
from tandem_rollout.client import GeneratorClient
from tandem_rollout.environments import ClassEnvironments
from tandem_rollout.episode import Limits, Player, Sample
from tandem_rollout.proxy import Proxy
from tandem_rollout.trajectory import Sequence, Trajectory
from tandem_rollout.turn_sampler import TurnSampler
from tandem_rollout.turns import TurnReader

pytestmark = pytest.mark.vllm

VOCAB = 75
TOLERANCE = 1e-3
"""Bound of |generator logprob − trainer logprob|, in nats, in float32: of the mean of a step, and of each token."""
TEMPERATURE = 0.7
TURNS = (24, 256, 24)
"""Tokens of the turns of an episode. The second one is still being sampled when the weights are switched."""
BEFORE_SWITCH = 32
"""Tokens of the second turn that are sampled before the switch, at least."""
TOKENIZER = make_tokenizer(VOCAB)
CHAT = renderer("", chat_template=CHAT_TEMPLATE, tokenizer=TOKENIZER)
LIMITS = Limits(max_tokens=1000, max_turns=len(TURNS))
TRIES = 4
"""How many episodes are played until the switch falls into the second turn. On a busy machine it may come too late."""


class Served(NamedTuple):
    """A vLLM generator with a tiny model, and its store of weights."""

    model: Path
    weights_dir: Path
    generator: Generator

    def policy(self, seed: int) -> ReferencePolicy:
        policy = ReferencePolicy(self.model, WeightStore(self.weights_dir))
        policy.change(seed)
        return policy


Play = Callable[[Sample], Awaitable[Trajectory]]


class Chat:
    """It always has something to say."""

    def reset(self, **columns: Any) -> str:
        return "Hi."

    async def step(self, message: Any) -> str:
        return "Go on."


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("episodes")
    # With peaked distributions, a token at another place would have a very different probability.
    model = make_tiny_model(root / "model", vocab=VOCAB, initializer_range=0.3, max_position_embeddings=1024)
    with running("vllm", model, root / "weights", log=root / "generator.log") as generator:
        yield Served(model, root / "weights", generator)


def test_trainer_and_generator_agree_on_every_sampled_token_of_an_episode(served: Served, tmp_path: Path) -> None:
    episodes = settings(environment="episodes:Echo", **TOOLS, max_turn_length=12, max_completion_length=120)
    project = with_code(
        Project(
            tmp_path / "project", served.model, served.generator, served.weights_dir,
            max_steps=3, log_completions=8, **episodes,
        )
    )  # fmt: skip
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    for line in project.lines("metrics.jsonl"):
        assert line["turns_mean"] > 2
        assert line["mismatch"] < TOLERANCE
        assert line["kl_sampler"] < TOLERANCE
    assert {message["role"] for one in project.lines("rollouts.jsonl") for message in one["messages"]} == {
        "user", "assistant", "tool",
    }  # fmt: skip


@pytest.mark.parametrize("who", ["an environment", "an agent"])
async def test_a_switch_within_turn_2_leaves_each_token_the_logprob_of_its_own_version(
    served: Served, who: str
) -> None:
    """The KV cache of the old weights is dropped, so the new weights compute the tokens before the switch again."""
    old, new = served.policy(1), served.policy(2)
    play = {"an environment": _with_environment, "an agent": _with_agent}[who]
    sequence, before, after = await _switched_in_turn_2(play, served.generator, old, new)

    turns = [sequence.steps[span.start : span.end] for span in sequence.sampled]
    kept = turns[1].count(before.step)
    assert kept >= BEFORE_SWITCH
    assert turns == [
        [before.step] * TURNS[0],
        [before.step] * kept + [after.step] * (TURNS[1] - kept),
        [after.step] * TURNS[2],
    ]

    steps_S = torch.tensor(sequence.steps[1:])
    old_S, new_S = (policy.token_logprobs(sequence.token_ids, TEMPERATURE) for policy in (old, new))
    errors_S = (torch.where(steps_S == before.step, old_S, new_S) - torch.tensor(sequence.logprobs[1:])).abs()
    sampled_S = torch.tensor(sequence.mask[1:]).bool()
    assert (old_S - new_S)[sampled_S].abs().mean() > 1, "the policies must differ, otherwise this test cannot fail"
    assert errors_S[sampled_S].max() < TOLERANCE


async def _switched_in_turn_2(
    play: Play, generator: Generator, old: ReferencePolicy, new: ReferencePolicy
) -> tuple[Sequence, Version, Version]:
    """Play an episode in which the weights are switched while the second turn is sampled.

    Returns:
        Its sequence, and the versions before and after the switch.
    """
    for _ in range(TRIES):
        step, attempt = generator.served.version
        before, after = Version(step + 1, max(1, attempt)), Version(step + 2, max(1, attempt))
        assert generator.put(before, old.publish(before)).status_code == 200
        sequence = await _played(play, generator, after, new.publish(after))
        turn = sequence.sampled[1]
        if len({*sequence.steps[turn.start : turn.end]}) > 1:
            return sequence, before, after
    raise AssertionError(f"in {TRIES} episodes, the second turn ended before the switch")


async def _played(play: Play, generator: Generator, after: Version, digest: str) -> Sequence:
    """Play an episode. When some tokens of its second turn have been sampled, switch to the version `after`."""
    client = GeneratorClient([f"http://127.0.0.1:{generator.port}"], TOKEN)
    sampling = Sampling(max_tokens=1, temperature=TEMPERATURE, ignore_eos=True)
    sampler = TurnSampler(client, sampling, seed=None, min_version=None, timeout_s=120)

    async def sample(prompt_ids: tuple[int, ...], *, max_tokens: int, turn: int) -> Completion:
        enough = generator.sampled_tokens + BEFORE_SWITCH
        asked = asyncio.create_task(sampler(prompt_ids, max_tokens=TURNS[turn], turn=turn))
        if turn == 1:
            await asyncio.to_thread(generator.wait_until_sampled, enough)
            weights = SetWeights(manifest_digest=digest, mode=SwitchMode.IN_FLIGHT)
            await client.set_weights(after, weights, timeout_s=60)
        return await asked

    try:
        trajectory = await play(sample)
    finally:
        await client.close()
    (sequence,) = trajectory.sequences
    return sequence


async def _with_environment(sample: Sample) -> Trajectory:
    environments = ClassEnvironments(Chat, timeout_s=5, max_characters=100)
    await environments.start()
    player = Player(CHAT, TurnReader(TOKENIZER, CHAT), LIMITS)
    return (await player.play_group(environments, Row(None), 0, [sample])).trajectories[0]


async def _with_agent(sample: Sample) -> Trajectory:
    """An agent that talks to the recording endpoint."""

    async def run(row: Any, client: AgentClient) -> None:
        messages = [{"role": "user", "content": "Hi."}]
        headers = {"Authorization": f"Bearer {client.api_key}"}
        async with httpx.AsyncClient(base_url=client.base_url, headers=headers, timeout=120) as http:
            for _ in TURNS:
                answer = await http.post("/chat/completions", json={"messages": messages})
                messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "Go on."}]

    proxy = Proxy("policy")
    async with proxy.serve():
        player = Agents(
            run=run,
            name="agent",
            proxy=proxy,
            renderer=CHAT,
            reader_for=lambda schemas: TurnReader(TOKENIZER, CHAT, schemas=schemas),
            normalize=plain_messages,
            limits=LIMITS,
            timeout_s=300,
        )
        trajectory = await player.play(Row(), sample)
    assert trajectory.reason is None
    return trajectory
