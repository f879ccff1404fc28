"""Measure the throughput of rollouts over HTTP, relative to the engine in its own process and to `vllm serve`.

    python tests/bench/rollouts.py [--rounds 3] [--groups 1 8 64]

Our engine, our server and the in-process caller share one process. The HTTP client and `vllm serve` have their own. The
three ways take turns, so that a slow phase of the machine affects all of them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import uvicorn
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, options, ratio, write
from support.models import make_tiny_model
from support.ports import free_port
from support.vllm_serve import vllm_serve
from tandem_generator.engines.vllm import sampling_params
from tandem_generator.plugin import TandemRoutes
from tandem_generator.vllm_server import parse_engine_args
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.generator import GeneratorConfig, GeneratorSettings
from tandem_protocol.messages import Prompt, RolloutRequest, Sampling

SAMPLES, TOKENS, QUICK_TOKENS = 8, 128, 8


def sampling(tokens: int) -> Sampling:
    return Sampling(n=SAMPLES, max_tokens=tokens, ignore_eos=True)


def prompts(number: int, groups: int) -> list[list[int]]:
    """Return different prompts for each measurement, so that the prefix cache does not help a later one."""
    return [[3 + (number * 7 + index * position + position) % 50 for position in range(16)] for index in range(groups)]


def over_rollouts(url: str, token_ids: list[list[int]], tokens: int) -> float:
    request = RolloutRequest(prompts=tuple(Prompt(token_ids=p) for p in token_ids), sampling=sampling(tokens))
    began = time.perf_counter()
    response = httpx.post(f"{url}/rollouts", json=request.model_dump(mode="json"), timeout=600)
    assert response.text.count('"group"') == len(token_ids), response.text[:300]
    return time.perf_counter() - began


def over_completions(url: str, model: str, token_ids: list[list[int]], tokens: int) -> float:
    """Send what TRL's client sends: prompts as token ids, `n` samples, one logprob per token."""
    body = {"model": model, "prompt": token_ids, "n": SAMPLES, "max_tokens": tokens, "ignore_eos": True}
    began = time.perf_counter()
    response = httpx.post(f"{url}/v1/completions", json=body | {"logprobs": 0, "return_token_ids": True}, timeout=600)
    used = response.json()["usage"]["completion_tokens"]
    assert used == len(token_ids) * SAMPLES * tokens, response.text[:300]
    return time.perf_counter() - began


async def main(rounds: int, groups: list[int], tokens: int) -> Table:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        model = str(make_tiny_model(Path(folder) / "model", max_position_embeddings=512))
        served = stack.enter_context(vllm_serve(Path(model), log=Path(folder) / "serve.log"))
        port = free_port()
        settings = GeneratorSettings(
            shared=SharedConfig(model=model, weights_dir=Path(folder) / "weights"),
            generator=GeneratorConfig(
                port=port,
                dtype="float32",
                enforce_eager=True,
                vllm={"block_size": 32, "max_num_seqs": 64, "disable_log_stats": True},
                env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            ),
        )
        args = parse_engine_args(settings, ["--disable-uvicorn-access-log"])
        TandemRoutes.settings = settings
        async with build_async_engine_client(args) as client:
            app = build_app(args, await client.get_supported_tasks(), client.model_config)
            await init_app_state(client, app.state, args, await client.get_supported_tasks())
            server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
            serving = asyncio.create_task(server.serve())
            url = f"http://127.0.0.1:{port}"
            loop = asyncio.get_running_loop()

            async def in_process(token_ids: list[list[int]]) -> float:
                params = sampling_params(sampling(tokens), None)
                began = time.perf_counter()
                await asyncio.gather(*(consume(client, p, params, f"{began}-{i}") for i, p in enumerate(token_ids)))
                return time.perf_counter() - began

            ways: dict[str, Callable[[list[list[int]]], Awaitable[float]]] = {
                "rollouts": lambda p: loop.run_in_executor(pool, over_rollouts, url, p, tokens),
                "in process": in_process,
                "serve": lambda p: loop.run_in_executor(pool, over_completions, str(served.base_url), model, p, tokens),
            }
            rows = [await measure(ways, rounds, count, tokens) for count in groups]
            server.should_exit = True
            await serving
    columns = ["groups at once", "`/rollouts`: tokens/s", "÷ engine in process", "÷ `vllm serve`"]
    return Table(title=f"8 completions of {tokens} tokens per group", columns=columns, rows=rows)


async def measure(
    ways: dict[str, Callable[[list[list[int]]], Awaitable[float]]], rounds: int, groups: int, tokens: int
) -> list[str]:
    """Measure the ways in turns, and return a row of the table."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for place, (name, way) in enumerate(ways.items()):
            taken = await way(prompts(round_ * len(ways) + place, groups))
            if round_:  # the first round warms up
                seconds[name].append(taken)
    rate = groups * SAMPLES * tokens / statistics.median(seconds["rollouts"])
    ratios = (ratio(seconds[name], seconds["rollouts"]) for name in ("in process", "serve"))  # of rates
    return [str(groups), f"{rate:,.0f}", *ratios]


async def consume(client: object, token_ids: list[int], params: SamplingParams, request_id: str) -> None:
    async for _ in client.generate({"prompt_token_ids": token_ids}, params, request_id):  # type: ignore[attr-defined]
        pass


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8, 64])
    given = parser.parse_args()
    rounds, tokens = (1, QUICK_TOKENS) if given.quick else (given.rounds, TOKENS)
    write([asyncio.run(main(rounds, given.groups, tokens))], given.result)
