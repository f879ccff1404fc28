"""Send a version to the generators, and look meanwhile whether it is still in the store."""

from __future__ import annotations

import asyncio

from anyio import move_on_after, to_thread

from tandem_protocol.errors import TandemError
from tandem_protocol.messages import ServedWeights, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_protocol.volume import vanished
from tandem_rollout.client import GeneratorClient

LOOK_S = 1.0
"""Pause between two looks."""


async def send_while_stored(
    client: GeneratorClient, store: WeightStore, version: Version, weights: SetWeights, timeout_s: float
) -> dict[str, ServedWeights]:
    """Have all generators serve a version, as long as it is in the store. They would wait for one that vanished.

    Raises:
        StoreError: The version is not in the store any more.
        TandemError, TimeoutError: See `GeneratorClient.set_weights`.
    """
    sending = asyncio.create_task(client.set_weights(version, weights, timeout_s))
    looking: asyncio.Task[bool] | None = None  # never waited for: a volume that hangs must not stop the deadline
    try:
        while not (await asyncio.wait([sending], timeout=LOOK_S))[0]:
            if looking is None:
                looking = asyncio.create_task(to_thread.run_sync(_is_gone, store, version, abandon_on_cancel=True))
            elif looking.done():
                if looking.result():
                    raise vanished(store.root, version)
                looking = None
        return sending.result()
    except TandemError as error:
        if sending.done() and await _is_gone_now(store, version):
            raise vanished(store.root, version) from error
        raise
    finally:
        if looking is not None:
            looking.cancel()
        sending.cancel()
        await asyncio.wait([sending])


async def _is_gone_now(store: WeightStore, version: Version) -> bool:
    """Whether the version is gone. False if the volume does not answer within `LOOK_S`."""
    with move_on_after(LOOK_S):
        return await to_thread.run_sync(_is_gone, store, version, abandon_on_cancel=True)
    return False


def _is_gone(store: WeightStore, version: Version) -> bool:
    try:
        store.directory(version).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # says nothing about the version
        return False
    return False
