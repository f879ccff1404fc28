"""Let an idle engine produce a token regularly. A hung engine looks healthy from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tandem_protocol.config.generator import GeneratorConfig

from .engines.base import Engine

_MAX_MISSED = 3
"""The process restarts after this number of checks in a row without a token."""


class Canary:
    """Watches an engine.

    Args:
        engine: The engine.
        config: How often to check, and how long to wait for a token.
        finished_groups: Returns how many groups have been finished. An engine that finishes groups is not checked.
        is_switching: Whether the weights are being switched. An engine is not checked meanwhile.
        failed: Set when the process must restart.
    """

    def __init__(
        self,
        engine: Engine,
        config: GeneratorConfig,
        *,
        finished_groups: Callable[[], int],
        is_switching: Callable[[], bool],
        failed: asyncio.Event,
    ) -> None:
        self.hung: str | None = None
        """What the last check found. None if the engine works."""
        self._engine = engine
        self._config = config
        self._finished_groups = finished_groups
        self._is_switching = is_switching
        self._failed = failed

    async def watch(self) -> None:
        """Check the engine until it has failed."""
        missed = 0
        while not self._failed.is_set():
            finished = self._finished_groups()
            await asyncio.sleep(self._config.canary_every_s)
            if self._finished_groups() != finished or self._is_switching():
                continue
            try:
                async with asyncio.timeout(self._config.canary_timeout_s):
                    await self._engine.check()
            except Exception as error:
                missed += 1
                self.hung = f"the engine did not produce a token, {missed} times in a row: {error!r}"
                if missed == _MAX_MISSED:
                    self._failed.set()
            else:
                missed = 0
                self.hung = None
