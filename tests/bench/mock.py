"""Measure how many completions per second one mock generator serves to one client over HTTP.

python tests/bench/mock.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.generators import running
from tandem_protocol.messages import Prompt, RolloutRequest, Sampling

REQUESTS, PROMPTS, SAMPLES = 4, 64, 8


def main(rounds: int) -> None:
    sampling = Sampling(n=SAMPLES, max_tokens=64)
    requests = [
        RolloutRequest(prompts=[Prompt(token_ids=[r, p], seed=p) for p in range(PROMPTS)], sampling=sampling)
        for r in range(REQUESTS)
    ]
    bodies = [request.model_dump(mode="json") for request in requests]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with running("mock", "none", root / "weights", log=root / "log") as generator:
            rates = []
            completions = 0
            for _ in range(rounds + 1):
                began = time.perf_counter()
                texts = [generator.client.post("/rollouts", json=body).text for body in bodies]
                rates.append(REQUESTS * PROMPTS * SAMPLES / (time.perf_counter() - began))
                completions = sum(text.count("token_ids") for text in texts)
            assert completions == REQUESTS * PROMPTS * SAMPLES
    print(f"mock: {statistics.median(rates[1:]):.0f} completions/s (median of {rounds} rounds, at most 64 tokens each)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
