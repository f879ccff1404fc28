"""Sample the turns of an episode over the wire contract."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

from tandem_protocol.errors import EngineFailed
from tandem_protocol.messages import Completion, Group, Prompt, RolloutRequest, Sampling
from tandem_protocol.version import Version

_SEED_BITS = 62


class Rollouts(Protocol):
    """The generators, such as `GeneratorClient`."""

    async def rollouts(self, request: RolloutRequest, on_group: Callable[[Group], object], *, timeout_s: float) -> None:
        """Call `on_group` exactly once for each prompt of the request."""


class TurnSampler:
    """Samples the turns of one episode. See `episode.Sample`."""

    def __init__(
        self,
        generators: Rollouts,
        sampling: Sampling,
        *,
        seed: int | None,
        min_version: Version | None,
        timeout_s: float,
        session: str | None = None,
    ) -> None:
        """
        Args:
            sampling: how to sample. `n` and `max_tokens` are set for each turn.
            seed: of the episode: the seed of the row's draw, plus the number of the episode in its group. The first
                turn then equals the completion of the same number in a request with `n` completions. None: no seed.
            min_version: oldest policy version that may answer.
            timeout_s: time limit of a turn.
            session: name of the episode. Its turns go to the same replica, whose KV cache has the turns before.
        """
        self._generators = generators
        self._sampling = sampling
        self._seed = seed
        self._min_version = min_version
        self._timeout_s = timeout_s
        self._session = session

    async def __call__(self, prompt_ids: tuple[int, ...], *, max_tokens: int, turn: int) -> Completion:
        """Sample one turn.

        Raises:
            TandemError: a generator refused the request.
            TimeoutError: there is no answer after `timeout_s`.
        """
        groups: list[Group] = []
        seed = None if self._seed is None else turn_seed(self._seed, turn)
        request = RolloutRequest(
            prompts=(Prompt(token_ids=prompt_ids, seed=seed, session=self._session),),
            sampling=self._sampling.model_copy(update={"n": 1, "max_tokens": max_tokens}),
            min_version=self._min_version,
        )
        await self._generators.rollouts(request, groups.append, timeout_s=self._timeout_s)
        if [len(group.completions) for group in groups] != [1]:
            raise EngineFailed(f"got {len(groups)} groups, expected one with one completion")
        return groups[0].completions[0]


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn: the episode's own for the first turn, and independent ones for the others."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> (64 - _SEED_BITS)
