"""Measure how many completions per second a client gets from 1, 2 and 4 mock generators.

    python tests/bench/mock.py [--rounds 5]

Each generator has the same number of requests in flight, and takes 10 ms per token. So twice the generators can serve
twice the completions, unless the client is the limit. Last, one generator without latency shows how fast the mock is.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, options, write
from support.generators import TOKEN, running
from tandem_protocol.messages import Prompt, RolloutRequest, Sampling
from tandem_rollout.client import GeneratorClient

LATENCY_S, TOKENS, SAMPLES, TIMEOUT_S = 0.01, 64, 8, 120.0
IN_FLIGHT = 8
"""Requests of one group in flight per generator."""


async def rate(urls: list[str], in_flight: int, requests: int) -> float:
    """Send requests, `in_flight` at once, and return completions per second."""
    client, places = GeneratorClient(urls, TOKEN), asyncio.Semaphore(in_flight)

    async def one(number: int) -> None:
        prompt = Prompt(token_ids=[number % 200 + 1, number // 200 + 1], seed=number)
        sampling = Sampling(n=SAMPLES, max_tokens=TOKENS, ignore_eos=True)
        async with places:
            request = RolloutRequest(prompts=[prompt], sampling=sampling)
            await client.rollouts(request, lambda _: None, timeout_s=TIMEOUT_S)

    await client.info(TIMEOUT_S)
    began_s = time.monotonic()
    await asyncio.gather(*map(one, range(requests)))
    seconds = time.monotonic() - began_s
    await client.close()
    return requests * SAMPLES / seconds


def main(rounds: int, per_flight: int) -> Table:
    """Measure the numbers of generators in turns."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        latency = ("--generator.mock.faults.token_latency_s", str(LATENCY_S))
        started = [
            stack.enter_context(running("mock", "none", root / "weights", *words, log=root / f"{n}.log"))
            for n, words in enumerate([latency, latency, latency, latency, ()])
        ]
        urls = [f"http://127.0.0.1:{one.port}" for one in started]
        sides = {"1": urls[:1], "2": urls[:2], "4": urls[:4], "1, without latency": urls[4:]}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(rounds + 1):
            for name, some in sides.items():
                in_flight = IN_FLIGHT * len(some)
                value = asyncio.run(rate(some, in_flight, in_flight * per_flight))
                rates[name] += [value] if round_ else []  # the first round warms up
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [[name, f"{value:,.0f}", f"{value / medians['1']:.2f}"] for name, value in medians.items()]
    return Table(title="Mock generators", columns=["generators", "completions/s", "÷ one"], rows=rows)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    write([main(1, 1) if given.quick else main(given.rounds, 8)], given.result)
