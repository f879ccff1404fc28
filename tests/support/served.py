"""A running generator, and the reference policy that is published to it."""

from __future__ import annotations

import time
from collections.abc import Callable

from support.generators import Generator
from support.reference_policy import ReferencePolicy
from tandem_protocol.messages import (
    Prompt,
)
from tandem_protocol.version import Version

MAX_MODEL_LEN = 2048
VOCAB = 64
PROMPTS = tuple(Prompt(token_ids=ids) for ids in ((5, 9, 13), (7,) * 20, (3, 60, 41, 22, 8)))


class Served:
    """A generator and the reference policy that is published to it."""

    def __init__(self, generator: Generator, policy: ReferencePolicy) -> None:
        self.generator = generator
        self.policy = policy
        self.client = generator.client

    @property
    def next(self) -> Version:
        """The next version that has not been published yet."""
        return Version(max((v.step for v in self.policy.store.versions()), default=0) + 1, 1)

    def switch(self) -> Version:
        """Change the policy, publish it, and switch the generator to it."""
        version = self.next
        self.policy.change(version.step)
        response = self.generator.put(version, self.policy.publish(version))
        assert response.status_code == 200, response.text
        return version

    def greedy(self) -> tuple[int, ...]:
        (group,) = self.generator.rollouts(PROMPTS[0], max_tokens=20, temperature=0.0, ignore_eos=True)
        return group.completions[0].token_ids

    def metrics(self) -> dict[str, float]:
        """Return metric name → value, without labels."""
        lines = [line for line in self.client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {line.partition("{")[0].split()[0]: float(line.split()[-1]) for line in lines}

    def runs(self, completions: int) -> bool:
        """Whether one request is running, and its completions have reached vLLM's scheduler."""
        metrics = self.metrics()
        return metrics["tandem_requests_running"] == 1 and (
            metrics.get("vllm:num_requests_running", completions) == completions
        )


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.02)
