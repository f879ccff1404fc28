"""Keep the generator's lease, so that retention does not delete the versions that it serves or is loading."""

from __future__ import annotations

import asyncio
import logging

from tandem_protocol.repeats import Repeats
from tandem_protocol.store import LEASE_S, WeightStore
from tandem_protocol.version import BASE, Version

repeats = Repeats(logging.getLogger(__name__))


class LeaseKeeper:
    """Writes and renews the lease of one generator. If the store cannot be written, it logs a warning and goes on."""

    def __init__(self, store: WeightStore, generator_id: str) -> None:
        self._store = store
        self._generator_id = generator_id
        self._versions: tuple[Version, ...] = ()
        self._writing = asyncio.Lock()

    async def hold(self, *versions: Version) -> None:
        """Replace the leased versions. Base weights are ignored, because they are not in the store."""
        self._versions = tuple(version for version in versions if version != BASE)
        await self._write()

    async def keep(self) -> None:
        """Renew the lease regularly, until the task is cancelled."""
        while True:
            await asyncio.sleep(LEASE_S / 4)
            await self._write()

    async def _write(self) -> None:
        async with self._writing:
            try:
                await asyncio.to_thread(self._store.lease, self._generator_id, self._versions)
            except OSError as error:
                problem = "cannot write the lease of this generator, so retention may delete the version that it serves"
                repeats.say(logging.WARNING, "lease", f"{problem}: {error}")
