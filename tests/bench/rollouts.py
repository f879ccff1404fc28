"""Measure the throughput of rollouts over HTTP, relative to calling the same vLLM engine in the same process.

    python tests/bench/rollouts.py [--rounds 5]

The engine, the server and the in-process caller share one process; the HTTP client has its own. The three ways
alternate, so that a slow phase of the machine affects all of them. The result is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import httpx
import uvicorn
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.models import make_tiny_model
from support.ports import free_port
from tandem_generator.engines.vllm import sampling_params
from tandem_generator.plugin import TandemRoutes
from tandem_generator.vllm_server import parse_engine_args
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.generator import GeneratorConfig, GeneratorSettings
from tandem_protocol.messages import Prompt, RolloutRequest, Sampling

PROMPTS, SAMPLES, TOKENS = 8, 8, 128
SAMPLING = Sampling(n=SAMPLES, max_tokens=TOKENS, ignore_eos=True)


def prompts(round_: int) -> list[list[int]]:
    """Return different prompts in each round, so that the prefix cache does not help a later measurement."""
    return [[3 + (round_ * 7 + index + position) % 50 for position in range(16)] for index in range(PROMPTS)]


def over_rollouts(url: str, token_ids: list[list[int]]) -> float:
    request = RolloutRequest(prompts=tuple(Prompt(token_ids=p) for p in token_ids), sampling=SAMPLING)
    began = time.perf_counter()
    response = httpx.post(f"{url}/rollouts", json=request.model_dump(mode="json"), timeout=600)
    assert response.text.count('"group"') == PROMPTS, response.text[:300]
    return time.perf_counter() - began


def over_completions(url: str, model: str, token_ids: list[list[int]]) -> float:
    """Send what TRL's client sends: prompts as token ids, `n` samples, one logprob per token."""
    body = {"model": model, "prompt": token_ids, "n": SAMPLES, "max_tokens": TOKENS, "ignore_eos": True}
    began = time.perf_counter()
    response = httpx.post(f"{url}/v1/completions", json=body | {"logprobs": 0, "return_token_ids": True}, timeout=600)
    assert response.json()["usage"]["completion_tokens"] == PROMPTS * SAMPLES * TOKENS, response.text[:300]
    return time.perf_counter() - began


async def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        model = str(make_tiny_model(Path(folder) / "model", max_position_embeddings=512))
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
                params = sampling_params(SAMPLING, None)
                began = time.perf_counter()
                await asyncio.gather(*(consume(client, p, params, f"{began}-{i}") for i, p in enumerate(token_ids)))
                return time.perf_counter() - began

            ways: dict[str, Callable[[list[list[int]]], Awaitable[float]]] = {
                "in process": in_process,
                "POST /rollouts": lambda p: loop.run_in_executor(pool, over_rollouts, url, p),
                "POST /v1/completions": lambda p: loop.run_in_executor(pool, over_completions, url, model, p),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for round_ in range(rounds + 1):
                for place, (name, way) in enumerate(ways.items()):
                    taken = await way(prompts(round_ * len(ways) + place))
                    if round_:  # the first round warms up
                        seconds[name].append(taken)
            report(seconds)
            server.should_exit = True
            await serving


async def consume(client: object, token_ids: list[int], params: SamplingParams, request_id: str) -> None:
    async for _ in client.generate({"prompt_token_ids": token_ids}, params, request_id):  # type: ignore[attr-defined]
        pass


def report(seconds: dict[str, list[float]]) -> None:
    tokens = PROMPTS * SAMPLES * TOKENS
    base = seconds["in process"]
    for name, taken in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(base, taken, strict=True))
        print(f"{name:22} {tokens / statistics.median(taken):7.0f} tok/s   ÷ in process = {ratio:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    asyncio.run(main(parser.parse_args().rounds))
