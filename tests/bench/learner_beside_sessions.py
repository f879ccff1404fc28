"""Measure how much a learner's update slows down while episodes stream in the same interpreter.

    python tests/bench/learner_beside_sessions.py [--models small tiny idle] [--sessions 256] [--turn-length 160]

Every session is an episode of the game of sessions.py, played without end: when a group of 8 episodes is over, the next
one begins. Mock replicas in processes of their own answer after the time that a generator takes for a turn.
The learner has one torch thread. The bench needs two cores, 0 and 1, and measures four ways in turns:

- alone: the learner on core 0, no sessions.
- own process: the learner on core 0; rollout side and replicas on core 1.
- own threads: the same cores, but the rollout side is in the learner's process. The difference to "own process" is the
  price of the interpreter that they share.
- one core: as "own threads", but rollout side and learner share core 0. The difference to "own threads" is the price of
  the missing core.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.sessions import GENERATIONS, LIMIT_S, Unscored, sampled
from support.chatml import make_chatml_model
from support.episodes import ALL_TEMPLATES
from support.generators import TOKEN, Generator, running
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.rollout import PromptsConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.messages import Prompt, RolloutRequest, Sampling
from tandem_rollout.client import GeneratorClient
from tandem_rollout.episode_sampler import EpisodeSampler
from tandem_rollout.episodes import load_episodes
from tandem_rollout.prompts import load_prompts

REPLICAS, TURNS = 2, 4
LEARNERS_CORE, OTHER_CORE = 0, 1
ROWS, PROMPT_TOKENS, TOKENS = 8, 32, 512
"""The batch of an update: the same as in trainer.py."""
IDLE = "idle"
"""A learner that does nothing, to measure the rollout side only."""


class Load(NamedTuple):
    """What the sessions are."""

    urls: tuple[str, ...]
    model: Path
    sessions: int
    turn_length: int
    turn_s: float


async def stream(load: Load, done: Callable[[], bool], note: Callable[[Any], None]) -> None:
    """Play episodes until `done`. Calls `note` with each group."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(load.model))
    source = load.model / "prompts.jsonl"
    prompts = PromptsConfig(source=str(source), chat_template_kwargs={"chat_template": ALL_TEMPLATES["Qwen 2.5"]})
    at_once = load.sessions // GENERATIONS
    rollout = {"num_prompts": at_once, "num_generations": GENERATIONS, "environment": "sessions:Game"}
    rollout |= {"max_completion_length": 3000, "max_turns": TURNS, "max_turn_length": load.turn_length}
    trainer = {"run_name": "bench", "max_steps": 1, "prompts": prompts, "rewards": [], "rollout": rollout}
    episodes = load_episodes(TrainerConfig.model_validate(trainer), SharedConfig(model=str(load.model)), tokenizer, 0)
    assert episodes is not None
    await episodes.start(needs_rewards=False)
    rows = load_prompts(prompts, tokenizer, episodes=episodes)
    client = GeneratorClient(list(load.urls), TOKEN)
    await client.info(LIMIT_S)
    async with episodes.playing(prompts, max_model_len=4096) as (play_group,):
        sampler = EpisodeSampler(client, play_group, Unscored())

        async def play(number: int) -> None:
            await asyncio.sleep(load.turn_s * number / at_once)  # turns of different groups begin at different times
            row = rows[number]
            request = RolloutRequest(
                prompts=(Prompt(token_ids=row.token_ids, seed=number),),
                sampling=Sampling(n=GENERATIONS, max_tokens=3000, ignore_eos=True),
            )
            while not done():
                await sampler.collect(request, [row], lambda _, group: note(group), timeout_s=LIMIT_S)

        playing = [asyncio.create_task(play(number)) for number in range(at_once)]
        while not done() and not any(task.done() for task in playing):  # noqa: ASYNC110 - set by another process
            await asyncio.sleep(0.05)
        for task in playing:
            task.cancel()
        results = await asyncio.gather(*playing, return_exceptions=True)
        assert not [r for r in results if isinstance(r, Exception)], results
    await client.close()
    await episodes.close()


class Streamer:
    """Plays episodes in the background, until `stop`."""

    def __init__(self, load: Load, core: int, *, own_process: bool) -> None:
        self._groups, self._theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        self._stopping: Any = context.Event() if own_process else threading.Event()
        arguments = (load, core, self._stopping, self._theirs)
        made = context.Process(target=_stream_on, args=arguments) if own_process else None
        self._running: Any = made or threading.Thread(target=_stream_on, args=arguments)
        self._running.start()
        self.pid = made.pid if made else None
        self.groups = 0

    def take(self) -> None:
        """Receive the groups that have finished."""
        while self._groups.poll():
            self._groups.recv()
            self.groups += 1

    def stop(self) -> None:
        assert self._running.is_alive(), "episodes are played"
        self._stopping.set()
        while self._running.is_alive():
            self.take()
            self._running.join(0.05)


def _stream_on(load: Load, core: int, stopping: Any, groups: Connection) -> None:
    os.sched_setaffinity(0, {core})  # of this thread
    asyncio.run(stream(load, stopping.is_set, groups.send))


class Measured(NamedTuple):
    """Means per update, and what the others did in the same time."""

    update_s: float
    cpu_s: float
    """CPU seconds of the learner's thread."""
    no_core_s: float
    """Seconds in which the learner's thread could run but had no core."""
    blocked_s: float
    """Seconds in which the learner's thread waited for something else. That is the lock of the interpreter."""
    rollout_load: float
    """CPU seconds of the rollout side per second."""
    replicas_load: float
    turns_per_s: float
    cpu_s_per_1000_groups: float


def process_cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds of processes."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def wait_until_streaming(load: Load, replicas: Sequence[Generator]) -> None:
    """Wait until every session has had a turn, on average."""
    deadline, first = time.monotonic() + LIMIT_S, turns_of(replicas)
    while turns_of(replicas) < first + load.sessions:
        assert time.monotonic() < deadline, "turns are sampled"
        time.sleep(0.2)


def turns_of(replicas: Sequence[Generator]) -> int:
    """Return how many turns the replicas have sampled."""
    return sum(sampled(replica)["turns"] for replica in replicas)


def measure(
    update: Callable[[], object], seconds: float, replicas: Sequence[Generator], streamer: Streamer | None
) -> Measured:
    """Make updates for some seconds."""
    pids = [replica.process.pid for replica in replicas]

    def counts() -> tuple[float, ...]:
        own_s = time.thread_time()
        beside_s = process_cpu_s([streamer.pid]) if streamer and streamer.pid else time.process_time() - own_s
        no_core_s = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
        return time.perf_counter(), own_s, no_core_s, beside_s, process_cpu_s(pids)

    turns_before, before = turns_of(replicas), counts()
    updates = 0
    while time.perf_counter() < before[0] + seconds:
        update()
        updates += 1
        if streamer:
            streamer.take()
    taken_s, own_s, no_core_s, beside_s, replicas_s = (b - a for a, b in zip(before, counts(), strict=True))
    turns = turns_of(replicas) - turns_before
    return Measured(
        update_s=taken_s / updates,
        cpu_s=own_s / updates,
        no_core_s=no_core_s / updates,
        blocked_s=(taken_s - own_s - no_core_s) / updates,
        rollout_load=beside_s / taken_s,
        replicas_load=replicas_s / taken_s,
        turns_per_s=turns / taken_s,
        cpu_s_per_1000_groups=1000 * beside_s * TURNS * GENERATIONS / turns if turns else 0.0,
    )


WAYS: dict[str, tuple[int, bool] | None] = {
    "alone": None,
    "own process": (OTHER_CORE, True),
    "own threads": (OTHER_CORE, False),
    "one core": (LEARNERS_CORE, False),
}
"""Name → the core of the rollout side, and whether it has a process of its own."""


def compare(
    update: Callable[[], object],
    load: Load,
    replicas: Sequence[Generator],
    names: Sequence[str],
    seconds: float,
    rounds: int,
) -> None:
    """Measure the ways of `names` in turns, and print medians and ratios."""
    ways: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in ways:
            how = WAYS[name]
            streamer = Streamer(load, how[0], own_process=how[1]) if how else None
            if streamer:
                wait_until_streaming(load, replicas)
            ways[name].append(measure(update, seconds, replicas, streamer))
            if streamer:
                streamer.stop()
    print(f"{'':12} update s   ÷ first    CPU s  no core  blocked  rollout replicas  turns/s  CPU s per 1,000 groups")
    first = ways[names[0]]
    for name, measured in ways.items():
        medians = Measured(*map(statistics.median, zip(*measured, strict=True)))
        ratio = statistics.median(one.update_s / two.update_s for one, two in zip(measured, first, strict=True))
        print(
            f"{name:12} {medians.update_s:8.4f} {ratio:9.3f} {medians.cpu_s:8.4f} {medians.no_core_s:8.4f} "
            f"{medians.blocked_s:8.4f} {medians.rollout_load:8.2f} {medians.replicas_load:8.2f} "
            f"{medians.turns_per_s:8.1f} {medians.cpu_s_per_1000_groups:8.1f}"
        )


def _update(name: str, folder: Path, tokens: int) -> Callable[[], object]:
    """Return a function that makes an update of a model. It has made two to warm up."""
    if name == IDLE:
        return functools.partial(time.sleep, 1.0)
    import torch

    from bench.trainer import make_model
    from bench.trainer_update import make_rows, make_update

    torch.set_num_threads(1)
    update = make_update(make_model(name, folder), make_rows(ROWS, tokens, PROMPT_TOKENS, ragged=False), {})
    update(), update()
    return update


def _trainers_switch_interval_s() -> float:
    from tandem_trainer.process import SWITCH_INTERVAL_S  # needs torch, which the process with the sessions does not

    return SWITCH_INTERVAL_S


def main(args: argparse.Namespace) -> None:
    sys.setswitchinterval(args.switch_interval_s or _trainers_switch_interval_s())
    os.sched_setaffinity(0, {OTHER_CORE})  # the replicas inherit it
    turn_s = args.turn_length / args.tokens_per_s
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        model = make_chatml_model(root / "model")
        lines = [{"prompt": f"Find number {n}.", "turns": TURNS} for n in range(args.sessions // GENERATIONS)]
        (model / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = root / "config.yaml"
        settings.write_text(f"generator: {{mock: {{faults: {{latency_s: {turn_s}}}}}}}\n")
        replicas = [
            stack.enter_context(
                running(
                    "mock",
                    model,
                    root / "weights",
                    "--generator-id",
                    f"replica-{n}",
                    "--config",
                    str(settings),
                    log=root / f"{n}.log",
                )
            )
            for n in range(REPLICAS)
        ]
        os.sched_setaffinity(0, {LEARNERS_CORE})
        urls = tuple(f"http://127.0.0.1:{replica.port}" for replica in replicas)
        load = Load(urls, model, args.sessions, args.turn_length, turn_s)
        for name in args.models:
            update = _update(name, root, args.tokens)
            print(f"{name}: {args.sessions} sessions, turns of {args.turn_length} tokens in {turn_s:.1f} s")
            compare(update, load, replicas, args.ways, args.seconds, args.rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--turn-length", type=int, default=160)
    parser.add_argument("--tokens-per-s", type=float, default=40.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=16.0)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--models", nargs="+", default=["small", "tiny"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--switch-interval-s", type=float, help="of the interpreter; default: the trainer's")
    main(parser.parse_args())
