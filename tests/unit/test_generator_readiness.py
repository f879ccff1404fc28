"""When a generator is ready, what it leases and which requests it takes: WeightSwitcher over a scripted engine."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from support.engines import ScriptedEngine, Start, WatchedStore, put, request, until, version_that_answers
from support.weights import publish, shard
from tandem_protocol.errors import (
    BadRequest,
    NotReady,
    StalePolicy,
    SwitchFailed,
    TandemError,
    WeightsRefused,
)
from tandem_protocol.messages import RolloutRequest
from tandem_protocol.store import Lease
from tandem_protocol.version import Version

V1, V2, V3 = Version(1, 1), Version(2, 1), Version(3, 1)


# -- start, readiness, leases ----------------------------------------------------------------------------------------


async def test_a_restarted_generator_serves_the_stores_version_before_it_is_ready(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    version = Version(42, 1)
    publish(store, version)
    engine.may_load.clear()
    starting = asyncio.create_task(start())
    await until(lambda: "load 42.1" in engine.calls)
    assert not starting.done()
    engine.may_load.set()
    switcher = await starting
    assert switcher.not_ready is None
    assert await version_that_answers(switcher) == version


async def test_a_version_that_is_retired_while_a_start_loads_it_gives_way_to_the_newest(
    start: Start, store: WatchedStore
) -> None:
    publish(store, V1)

    def retire() -> None:
        if V1 in store.versions():
            publish(store, V2)
            shutil.rmtree(store.directory(V1))

    store.at_verify = retire
    assert (await start()).version == V2


async def test_a_damaged_latest_gives_way_to_the_newest_version_that_is_whole(
    start: Start, store: WatchedStore
) -> None:
    for version in (V1, V2, V3):
        publish(store, version)
    shard(store, V3).unlink()
    switcher = await start()
    assert switcher.version == V2
    with pytest.raises(StalePolicy):
        switcher.rollouts(request(min_version=V3))


async def test_a_version_that_loads_only_half_way_at_a_start_gives_way_too(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    for version in (V1, V2):
        publish(store, version)
    engine.failures = [RuntimeError("the device is lost")]
    assert (await start()).version == V1


async def test_a_store_of_which_nothing_can_be_served_ends_the_start_and_says_what_to_do(
    start: Start, store: WatchedStore
) -> None:
    for version in (V1, V2):
        publish(store, version)
        shard(store, version).unlink()
    with pytest.raises(WeightsRefused, match=r"none of the 2 versions .*set shared.weights_dir to a folder"):
        await start()


async def test_an_engine_that_hangs_is_not_ready_until_it_computes_again(start: Start, engine: ScriptedEngine) -> None:
    switcher = await start(canary_every_s=0.2, canary_timeout_s=0.02)
    engine.computes.clear()
    await until(lambda: switcher.not_ready is not None)
    assert switcher.not_ready.startswith("the engine did not produce a token, ")
    with pytest.raises(NotReady, match="did not produce a token"):
        switcher.rollouts(request())
    engine.computes.set()
    await until(lambda: switcher.not_ready is None)


async def test_an_engine_that_goes_on_hanging_ends_the_process(start: Start, engine: ScriptedEngine) -> None:
    switcher = await start(canary_every_s=0.01, canary_timeout_s=0.01)
    engine.computes.clear()
    async with asyncio.timeout(5):
        await switcher.failed.wait()
    assert switcher.not_ready == "the engine did not produce a token, 3 times in a row: TimeoutError()"


async def test_what_is_being_loaded_and_what_serves_are_leased_and_no_more(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher, (_, first), (_, second) = await start(), publish(store, V1), publish(store, V2)
    await put(switcher, V1, first)
    assert store.leased() == {V1}
    while_verified: list[set[Version]] = []
    store.at_verify = lambda: while_verified.append(store.leased())
    await put(switcher, V2, second)
    assert while_verified == [{V1, V2}]
    assert store.leased() == {V2}
    _, third = publish(store, V3)
    engine.failures = [RuntimeError("the device is lost")]
    with pytest.raises(SwitchFailed):
        await put(switcher, V3, third)
    assert store.leased() == {V2}
    await switcher.close()
    assert store.leased() == set()


async def test_leases_are_renewed_also_during_a_long_switch(
    start: Start, engine: ScriptedEngine, store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_generator.lease.LEASE_S", 0.04)
    switcher, (_, first), (_, second) = await start(), publish(store, V1), publish(store, V2)
    await put(switcher, V1, first)
    await renewal(store, {V1})
    engine.may_load.clear()
    switch = asyncio.create_task(put(switcher, V2, second))
    await until(lambda: "load 2.1" in engine.calls)
    await renewal(store, {V1, V2})
    engine.may_load.set()
    await switch


async def renewal(store: WatchedStore, versions: set[Version]) -> None:
    """Wait until the lease has been written again, naming `versions`."""
    path = store.root / "served" / "g.json"
    before = Lease.model_validate_json(path.read_bytes()).renewed_unix_s
    await until(lambda: Lease.model_validate_json(path.read_bytes()).renewed_unix_s > before)
    assert store.leased() == versions


async def test_a_store_that_cannot_be_written_is_served_from_all_the_same(start: Start, store: WatchedStore) -> None:
    switcher, (_, digest) = await start(), publish(store, V1)
    (store.root / "served").write_text("no directory")
    assert (await put(switcher, V1, digest)).version == V1
    assert switcher.not_ready is None


# -- admission -------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[RolloutRequest, type[TandemError], str]] = [
    (request(min_version=V1), StalePolicy, r"got min_version 1\.1; this generator serves 0\.0"),
    (request(*range(30), max_tokens=3), BadRequest, "a prompt of 30 tokens and max_tokens 3, expected at most 32"),
    (request(5, 100), BadRequest, "got token id 100, expected ids below the vocabulary's size 100"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), REFUSED, ids=[error.__name__ for _, error, _ in REFUSED])
async def test_a_request_that_cannot_be_served_is_refused_before_anything_is_sampled(
    start: Start, wrong: RolloutRequest, error: type[TandemError], words: str
) -> None:
    switcher = await start()
    with pytest.raises(error, match=words):
        switcher.rollouts(wrong)


async def test_a_request_at_the_limits_is_served(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    await put(switcher, V1, publish(store, V1)[1])
    groups = [group async for group in switcher.rollouts(request(*range(70, 100), max_tokens=2, min_version=V1))]
    assert [group.prompt_index for group in groups] == [0]
