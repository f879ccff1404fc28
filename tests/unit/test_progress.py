"""Heartbeats between groups, and waiting for a version, with engines that the test controls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from support.engines import ScriptedEngine, Start, WatchedStore, put, until
from support.weights import publish
from tandem_generator.progress import TokenCount, with_heartbeats
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.config.generator import GeneratorConfig
from tandem_protocol.errors import EngineFailed, NotReady, StalePolicy, SwitchFailed
from tandem_protocol.messages import Group, Progress
from tandem_protocol.version import BASE, Version

V1, V2 = Version(1, 1), Version(2, 1)


class Groups:
    """A stream whose groups the test releases."""

    def __init__(self) -> None:
        self.released: asyncio.Queue[Group | Exception | None] = asyncio.Queue()
        self.closed = False
        self.count = TokenCount()

    async def stream(self) -> AsyncGenerator[Group, None]:
        try:
            while (group := await self.released.get()) is not None:
                if isinstance(group, Exception):
                    raise group
                yield group
        finally:
            self.closed = True


def group(index: int) -> Group:
    return Group(prompt_index=index, completions=())


async def test_a_hanging_engine_gives_heartbeats_with_the_same_number_of_tokens() -> None:
    groups = Groups()
    parts = with_heartbeats(groups.stream(), groups.count, 0.001)
    groups.count.add(3)
    assert [await anext(parts), await anext(parts)] == [Progress(tokens=3)] * 2
    groups.count.add(2)
    assert await anext(parts) == Progress(tokens=5)
    groups.released.put_nowait(group(0))
    await until(groups.released.empty)
    assert await anext(parts) == group(0)
    groups.released.put_nowait(None)
    assert [part async for part in parts if isinstance(part, Group)] == []
    assert groups.closed


async def test_without_heartbeats_only_groups_are_sent() -> None:
    groups = Groups()
    for part in (group(1), group(0), None):
        groups.released.put_nowait(part)
    assert [part async for part in with_heartbeats(groups.stream(), groups.count, None)] == [group(1), group(0)]


async def test_an_error_of_the_engine_passes_through() -> None:
    groups = Groups()
    groups.released.put_nowait(EngineFailed("lost"))
    with pytest.raises(EngineFailed, match="lost"):
        await anext(with_heartbeats(groups.stream(), groups.count, 0.1))
    assert groups.closed


@pytest.mark.parametrize("reader", ["leaves after a heartbeat", "leaves after a group", "is cancelled"])
async def test_a_reader_that_leaves_closes_the_stream(reader: str) -> None:
    groups = Groups()
    parts = with_heartbeats(groups.stream(), groups.count, 0.001 if "heartbeat" in reader else None)
    if "leaves" in reader:
        if "group" in reader:
            groups.released.put_nowait(group(0))
        await anext(parts)
        await parts.aclose()
    else:
        reading = asyncio.ensure_future(anext(parts))
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert groups.closed


async def test_a_waiting_request_ends_when_the_generator_stops(start: Start) -> None:
    switcher = await start()
    waiting = asyncio.create_task(switcher.wait_for(V1, 600))
    await asyncio.sleep(0)
    switcher.stop()
    async with asyncio.timeout(5):
        with pytest.raises(NotReady, match="it is stopping"):
            await waiting


async def test_a_switch_answers_a_waiting_request(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    waiting = asyncio.create_task(switcher.wait_for(V1, 600))
    await asyncio.sleep(0)
    await put(switcher, V1, publish(store, V1)[1])
    async with asyncio.timeout(5):
        assert (await waiting).version == V1


async def test_before_the_engine_has_started_no_version_serves(engine: ScriptedEngine, store: WatchedStore) -> None:
    switcher = WeightSwitcher(engine, store, GeneratorConfig(generator_id="g"))
    waiting = asyncio.create_task(switcher.wait_for(BASE, 600))
    await asyncio.sleep(0)
    assert not waiting.done()
    await switcher.start()
    async with asyncio.timeout(5):
        assert (await waiting).version == BASE
    await switcher.close()


async def test_a_failed_switch_does_not_answer_a_waiting_request(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher = await start()
    await put(switcher, V1, publish(store, V1)[1])
    waiting = asyncio.create_task(switcher.wait_for(V2, 0.2))
    engine.failures = [RuntimeError("the device is lost")]
    with pytest.raises(SwitchFailed):
        await put(switcher, V2, publish(store, V2)[1])
    with pytest.raises(StalePolicy, match=r"got at_least 2\.1; this generator serves 1\.1 after 0\.2 s"):
        await waiting
