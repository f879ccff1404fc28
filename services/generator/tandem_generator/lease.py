"""The lease that keeps retention away from the versions this generator holds or is loading."""

from __future__ import annotations

import asyncio
import logging

from tandem_protocol.store import LEASE_S, WeightStore
from tandem_protocol.version import BASE, Version

log = logging.getLogger(__name__)


class LeaseKeeper:
    """One generator's lease. A store that cannot be written is served from all the same, with a warning."""

    def __init__(self, store: WeightStore, generator_id: str) -> None:
        self._store = store
        self._generator_id = generator_id
        self._versions: tuple[Version, ...] = ()
        self._writing = asyncio.Lock()

    async def hold(self, *versions: Version) -> None:
        """Name these versions, and no others, from now on; base weights are not the store's and need none."""
        self._versions = tuple(version for version in versions if version != BASE)
        await self._write()

    async def keep(self) -> None:
        """Renew what is held, for ever."""
        while True:
            await asyncio.sleep(LEASE_S / 4)
            await self._write()

    async def _write(self) -> None:
        async with self._writing:
            try:
                await asyncio.to_thread(self._store.lease, self._generator_id, self._versions)
            except OSError as error:
                log.warning("cannot write this generator's lease, so retention may delete what it serves: %s", error)
