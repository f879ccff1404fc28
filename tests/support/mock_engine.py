"""The mock engine as the generators of episodes, and its policy, which anyone can recompute."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from support.episodes import bpe_tokenizer
from tandem_generator.engines.mock import MockEngine, MockPolicy
from tandem_protocol.config.generator import MockConfig
from tandem_protocol.messages import Group, RolloutRequest, Sampling, SwitchMode
from tandem_protocol.version import Version
from tandem_rollout.trajectory import Trajectory

TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + '<pad>' }}{% endfor %}assistant:"
"""The mock ends its turns with token 0, which is `<pad>` in this tokenizer."""
SAMPLING = Sampling(max_tokens=1, temperature=0.9)


class Engine:
    """The mock engine as the generators."""

    def __init__(self, **faults: float) -> None:
        config = MockConfig.model_validate({"vocab_size": len(bpe_tokenizer()), "faults": faults})
        self.engine = MockEngine("", config, 4096)
        self._sampled = 0
        self._waiting: list[tuple[int, asyncio.Event]] = []

    async def rollouts(self, request: RolloutRequest, on_group: Callable[[Group], object], *, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            async for group in self.engine.generate(request, self._count):
                on_group(group)

    def _count(self, tokens: int) -> None:
        self._sampled += tokens
        for waiting in [one for one in self._waiting if one[0] <= self._sampled]:
            self._waiting.remove(waiting)
            waiting[1].set()

    async def switch(self, step: int) -> None:
        await self.engine.pause(SwitchMode.IN_FLIGHT)
        await self.engine.load_weights(Version(step, 1), [])
        await self.engine.resume()

    async def switch_after(self, tokens: int, step: int) -> None:
        """Switch when this number of further tokens has been sampled."""
        reached = asyncio.Event()
        self._waiting.append((self._sampled + tokens, reached))
        await reached.wait()
        await self.switch(step)


def assert_logprobs_are_the_policys(trajectory: Trajectory) -> None:
    """Recompute each sampled token's logprob from everything before it, under the version that is stamped on it."""
    policy = MockPolicy(len(bpe_tokenizer()), 0)
    for sequence in trajectory.sequences:
        for place, step in enumerate(sequence.steps):
            if step < 0:
                continue
            context = policy.context(sequence.token_ids[:place])
            tokens, probabilities = policy.distribution(context, Version(step, 1), SAMPLING)
            at = tokens.index(sequence.token_ids[place])
            assert math.log(probabilities[at]) == sequence.logprobs[place]
