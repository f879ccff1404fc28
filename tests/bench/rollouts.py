"""Measure the throughput of rollouts over HTTP, relative to the engine in its own process and to `vllm serve`.

    python tests/bench/rollouts.py [--rounds 3] [--groups 1 8 64]

The ways take turns, and every second round goes backwards: A B C, C B A. So a slow phase of the machine affects all of
them, and none of them always comes after the same one. All three sample the same number of tokens with the same
parameters, and return the logprobs of the distribution that was sampled from:

- `/rollouts`: the trainer's own client asks our server. It has a process of its own, asks for heartbeats, keeps its
  connection, and reads the groups. The time is that of one request with all groups.
- in process: the server's process calls the same engine, without HTTP. It gets token ids and logprobs, and no text.
- `vllm serve`: what TRL's client sends, in the process of our client and with a connection that is kept. The server and
  its engine have no plug-in of Tandem. It also returns text, which it makes of the tokens.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
import uvloop
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, options, ratio, write
from support.models import make_tiny_model
from support.ports import free_port
from support.vllm_serve import vllm_serve
from tandem_generator.engine_options import as_words
from tandem_generator.engines.vllm import sampling_params
from tandem_generator.plugin import TandemRoutes
from tandem_generator.vllm_server import parse_engine_args
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.generator import GeneratorConfig, GeneratorSettings
from tandem_protocol.messages import Group, Prompt, RolloutRequest, Sampling
from tandem_rollout.client import GeneratorClient

SAMPLES, TOKENS, QUICK_TOKENS = 8, 128, 8
FEWEST_ROUNDS, GROUPS_PER_WAY = 3, 64
"""A way is measured until it has sampled about this many groups, because one group takes less than a second."""
TIMEOUT_S = 600.0

Way = Callable[[list[list[int]]], Awaitable[float]]
"""Takes prompts, samples the completions of all of them, and returns the seconds."""


def sampling(tokens: int) -> Sampling:
    return Sampling(n=SAMPLES, max_tokens=tokens, ignore_eos=True)


def prompts(number: int, groups: int) -> list[list[int]]:
    """Return different prompts for each measurement, so that the prefix cache does not help a later one."""
    random_ = random.Random(f"{groups} {number}")
    return [[random_.randrange(3, 64) for _ in range(16)] for _ in range(groups)]


@functools.cache
def runner() -> asyncio.Runner:
    return asyncio.Runner()


@functools.cache
def generator(url: str) -> GeneratorClient:
    return GeneratorClient([url], None)


@functools.cache
def completions(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=TIMEOUT_S)


def over_rollouts(url: str, token_ids: list[list[int]], tokens: int) -> float:
    """Ask as the trainer does. Called in the clients' process."""
    client, groups = generator(url), list[Group]()
    began = time.perf_counter()
    request = RolloutRequest(prompts=tuple(Prompt(token_ids=p) for p in token_ids), sampling=sampling(tokens))
    runner().run(client.rollouts(request, groups.append, timeout_s=TIMEOUT_S))
    taken = time.perf_counter() - began
    sampled = sum(len(completion.logprobs) for group in groups for completion in group.completions)
    assert sampled == len(token_ids) * SAMPLES * tokens, f"got {sampled} tokens"
    return taken


def over_completions(url: str, model: str, token_ids: list[list[int]], tokens: int) -> float:
    """Ask as TRL's client does: prompts as token ids, `n` samples, one logprob per token."""
    body = {"model": model, "prompt": token_ids, "n": SAMPLES, "max_tokens": tokens, "ignore_eos": True}
    client = completions(url)
    began = time.perf_counter()
    response = client.post("/v1/completions", json=body | {"logprobs": 0, "return_token_ids": True})
    used = response.json()["usage"]["completion_tokens"]
    taken = time.perf_counter() - began
    assert used == len(token_ids) * SAMPLES * tokens, response.text[:300]
    return taken


async def in_process(client: EngineClient, token_ids: list[list[int]], tokens: int) -> float:
    params = sampling_params(sampling(tokens), None)
    began = time.perf_counter()
    await asyncio.gather(*(consume(client, p, params, f"{began}-{index}") for index, p in enumerate(token_ids)))
    return time.perf_counter() - began


async def consume(client: EngineClient, token_ids: list[int], params: SamplingParams, request_id: str) -> None:
    async for output in client.generate({"prompt_token_ids": token_ids}, params, request_id):
        sampled = sum(len(completion.logprobs) for completion in output.outputs)
    assert sampled == SAMPLES * params.max_tokens, f"got {sampled} tokens"


@asynccontextmanager
async def serving(model: str, weights_dir: Path, port: int) -> AsyncIterator[EngineClient]:
    """Run our server in this process, on the event loop that it has in production. Yields the client of its engine."""
    settings = GeneratorSettings(
        shared=SharedConfig(model=model, weights_dir=weights_dir),
        generator=GeneratorConfig(
            port=port,
            dtype="float32",
            enforce_eager=True,
            vllm={"block_size": 32, "max_num_seqs": 64, "disable_log_stats": True},
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        ),
    )
    args = parse_engine_args(settings, as_words(settings.generator.vllm))
    TandemRoutes.settings = settings
    async with build_async_engine_client(args) as client:
        app = build_app(args, await client.get_supported_tasks(), client.model_config)
        await init_app_state(client, app.state, args, await client.get_supported_tasks())
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        running = asyncio.create_task(server.serve())
        try:
            yield client
        finally:
            server.should_exit = True
            await running


async def main(rounds: int | None, groups: list[int], tokens: int) -> Table:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        model = str(make_tiny_model(folder / "model", max_position_embeddings=512))
        os.environ["VLLM_PLUGINS"] = ""  # `vllm serve` would load Tandem's; parse_engine_args adds it for our server
        mode = ("--logprobs-mode", "processed_logprobs")
        served = str(stack.enter_context(vllm_serve(Path(model), *mode, log=folder / "serve.log")).base_url)
        port = free_port()
        client = await stack.enter_async_context(serving(model, folder / "weights", port))
        url, run = f"http://127.0.0.1:{port}", functools.partial(asyncio.get_running_loop().run_in_executor, pool)
        ways: dict[str, Way] = {
            "rollouts": lambda p: run(over_rollouts, url, p, tokens),
            "in process": lambda p: in_process(client, p, tokens),
            "serve": lambda p: run(over_completions, served, model, p, tokens),
        }
        await measure(ways, 1, 1)  # warms up: connections, and code that vLLM compiles
        taken = {n: await measure(ways, rounds or max(FEWEST_ROUNDS, GROUPS_PER_WAY // n), n) for n in groups}
    columns = ["groups at once", "`/rollouts`: tokens/s", "÷ engine in process", "÷ `vllm serve`"]
    rows = [row(number, tokens, seconds) for number, seconds in taken.items()]
    return Table(title=f"8 completions of {tokens} tokens per group", columns=columns, rows=rows)


async def measure(ways: dict[str, Way], rounds: int, groups: int) -> dict[str, list[float]]:
    """Measure the ways in turns, every second round backwards. Returns way → seconds of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    number = 0
    for round_ in range(rounds):
        for name in reversed(ways) if round_ % 2 else ways:
            seconds[name].append(await ways[name](prompts(number, groups)))
            number += 1
    return seconds


def row(groups: int, tokens: int, seconds: dict[str, list[float]]) -> list[str]:
    rate = groups * SAMPLES * tokens / statistics.median(seconds["rollouts"])
    ratios = (ratio(seconds[name], seconds["rollouts"]) for name in ("in process", "serve"))  # of rates
    return [str(groups), f"{rate:,.0f}", *ratios]


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, help="of every row; default: more for fewer groups")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8, 64])
    given = parser.parse_args()
    rounds, tokens = (1, QUICK_TOKENS) if given.quick else (given.rounds, TOKENS)
    write([uvloop.run(main(rounds, given.groups, tokens))], given.result)
