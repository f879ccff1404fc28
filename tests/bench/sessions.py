"""Measure what thousands of sessions at the same time cost the rollout side, against four mock replicas.

    python tests/bench/sessions.py [--sessions 2000] [--turns 4]

Every session is an episode of a small game, played as in a run: chat template, tokenizer, requests, environment class.
All sessions are played at once. The replicas have processes of their own, whose CPU time is not counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, options, write
from support.chatml import make_chatml_model
from support.episodes import ALL_TEMPLATES
from support.generators import TOKEN, Generator, running
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.rollout import PromptsConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.messages import Prompt, RolloutRequest, Sampling
from tandem_rollout.client import GeneratorClient
from tandem_rollout.environments import Done
from tandem_rollout.episode_sampler import EpisodeSampler
from tandem_rollout.episodes import load_episodes
from tandem_rollout.prompts import load_prompts
from tandem_rollout.trajectory import Group, Trajectory

REPLICAS, GENERATIONS, TURN_LENGTH = 4, 8, 48
LIMIT_S = 240.0
"""The bench gives up after this time."""


class Game:
    """Answers in text, until the last turn. The policy's words are random, so nobody wins."""

    def reset(self, turns: int, **columns: Any) -> str:
        self.left = turns
        return " Say a number."

    async def step(self, message: dict[str, Any]) -> str | Done:
        self.left -= 1
        return f"{len(message['content'])} is too low. Say another number." if self.left else Done(1.0)


class Unscored:
    """Gives every trajectory the same reward."""

    async def score(
        self, row: Any, trajectories: Sequence[Trajectory], environments: Sequence[Any] = ()
    ) -> tuple[Trajectory, ...]:
        return tuple(one.model_copy(update={"reward": 0.0}) for one in trajectories)


async def play(urls: list[str], model: Path, sessions: int, turns: int) -> tuple[list[Group], float, float]:
    """Play the sessions. Returns their groups, and the seconds and CPU seconds that they took."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    source = model / "prompts.jsonl"
    lines = [{"prompt": f"Find number {n}.", "turns": turns} for n in range(sessions // GENERATIONS)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = PromptsConfig(source=str(source), chat_template_kwargs={"chat_template": ALL_TEMPLATES["Qwen 2.5"]})
    rollout = {"num_prompts": len(lines), "num_generations": GENERATIONS, "environment": f"{__name__}:Game"}
    rollout |= {"max_completion_length": 2000, "max_turns": turns, "max_turn_length": TURN_LENGTH}
    trainer = {"run_name": "bench", "max_steps": 1, "prompts": prompts, "rewards": [], "rollout": rollout}
    shared = SharedConfig(model=str(model))
    episodes = load_episodes(TrainerConfig.model_validate(trainer), shared, tokenizer, 0)
    assert episodes is not None
    await episodes.start(needs_rewards=False)
    rows = load_prompts(prompts, tokenizer, episodes=episodes)
    client = GeneratorClient(urls, TOKEN)
    await client.info(LIMIT_S)
    request = RolloutRequest(
        prompts=tuple(Prompt(token_ids=row.token_ids, seed=1000 * row.index) for row in rows),
        sampling=Sampling(n=GENERATIONS, max_tokens=2000),
    )
    groups: list[Group] = []
    async with episodes.playing(prompts, max_model_len=4096) as (play_group,):
        sampler = EpisodeSampler(client, play_group, Unscored())
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        await sampler.collect(request, rows, lambda _, group: groups.append(group), timeout_s=LIMIT_S)
        taken = time.monotonic() - began_s, time.process_time() - began_cpu_s
    await client.close()
    await episodes.close()
    return groups, *taken


def sampled(replica: Generator) -> dict[str, int]:
    """Return how many turns and tokens a replica has sampled."""
    lines = dict(line.rsplit(" ", 1) for line in replica.client.get("/metrics").text.splitlines() if line[:1] != "#")
    names = {"turns": "tandem_rollout_completions_total", "tokens": "tandem_rollout_tokens_total"}
    return {name: int(float(lines[series])) for name, series in names.items()}


def main(sessions: int, turns: int) -> Table:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        model = make_chatml_model(root / "model")
        replicas = [
            stack.enter_context(
                running("mock", model, root / "weights", "--generator-id", f"replica-{n}", log=root / f"{n}.log")
            )
            for n in range(REPLICAS)
        ]
        urls = [f"http://127.0.0.1:{replica.port}" for replica in replicas]
        before = [sampled(replica) for replica in replicas]
        groups, wall_s, cpu_s = asyncio.run(play(urls, model, sessions, turns))
        after = [sampled(replica) for replica in replicas]
    episodes = [episode for group in groups for episode in group.trajectories]
    assert {episode.status for episode in episodes} <= {"finished", "max_turns"}, "every session is played to its end"
    count, played = len(episodes), sum(episode.turns for episode in episodes)
    shares = ", ".join(str(new["turns"] - old["turns"]) for old, new in zip(before, after, strict=True))
    rows = [
        ["sessions/s, with all processes on the same cores", f"{count / wall_s:.0f}"],
        ["CPU s of the rollout side per 1,000 sessions", f"{1000 * cpu_s / count:.1f}"],
        ["CPU s of the rollout side per 1,000 turns", f"{1000 * cpu_s / played:.2f}"],
        ["turns per replica", shares],
    ]
    return Table(
        title=f"{count:,} sessions of {turns} turns, {REPLICAS} replicas", columns=["what", "figure"], rows=rows
    )


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=4)
    given = parser.parse_args()
    write([main(64 if given.quick else given.sessions, given.turns)], given.result)
