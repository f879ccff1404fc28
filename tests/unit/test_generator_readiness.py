"""WeightSwitcher with a scripted engine: start, readiness, leases, and which requests are accepted."""

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


async def test_a_restarted_generator_loads_latest_before_it_is_ready(
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


async def test_a_start_survives_the_deletion_of_the_version_it_loads(start: Start, store: WatchedStore) -> None:
    publish(store, V1)

    def retire() -> None:
        if V1 in store.versions():
            publish(store, V2)
            shutil.rmtree(store.directory(V1))

    store.at_verify = retire
    assert (await start()).version == V2


async def test_a_start_with_damaged_latest_serves_the_newest_undamaged_version(
    start: Start, store: WatchedStore
) -> None:
    for version in (V1, V2, V3):
        publish(store, version)
    shard(store, V3).unlink()
    switcher = await start()
    assert switcher.version == V2
    with pytest.raises(StalePolicy):
        switcher.rollouts(request(min_version=V3))


async def test_a_start_with_a_failing_load_serves_the_version_before(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    for version in (V1, V2):
        publish(store, version)
    engine.failures = [RuntimeError("the device is lost")]
    assert (await start()).version == V1


async def test_a_start_with_only_damaged_versions_fails_with_the_fix(start: Start, store: WatchedStore) -> None:
    for version in (V1, V2):
        publish(store, version)
        shard(store, version).unlink()
    with pytest.raises(WeightsRefused, match=r"none of the 2 versions .*set shared.weights_dir to a new folder"):
        await start()


async def test_a_hung_engine_is_not_ready_until_it_recovers(start: Start, engine: ScriptedEngine) -> None:
    switcher = await start(canary_every_s=0.2, canary_timeout_s=0.02)
    engine.computes.clear()
    await until(lambda: switcher.not_ready is not None)
    assert (switcher.not_ready or "").startswith("the engine did not produce a token, ")
    with pytest.raises(NotReady, match="did not produce a token"):
        switcher.rollouts(request())
    engine.computes.set()
    await until(lambda: switcher.not_ready is None)


async def test_an_engine_that_stays_hung_ends_the_process(start: Start, engine: ScriptedEngine) -> None:
    switcher = await start(canary_every_s=0.01, canary_timeout_s=0.01)
    engine.computes.clear()
    async with asyncio.timeout(60):
        await switcher.failed.wait()
    assert switcher.not_ready == "the engine did not produce a token, 3 times in a row: TimeoutError()"


async def test_only_the_served_and_the_loading_version_are_leased(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher = await start()
    _, first = publish(store, V1)
    _, second = publish(store, V2)
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


async def test_leases_are_renewed_during_a_long_switch(
    start: Start, engine: ScriptedEngine, store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_generator.lease.LEASE_S", 0.04)
    switcher = await start()
    _, first = publish(store, V1)
    _, second = publish(store, V2)
    await put(switcher, V1, first)
    await renewal(store, {V1})
    engine.may_load.clear()
    switch = asyncio.create_task(put(switcher, V2, second))
    await until(lambda: "load 2.1" in engine.calls)
    await renewal(store, {V1, V2})
    engine.may_load.set()
    await switch


async def renewal(store: WatchedStore, versions: set[Version]) -> None:
    """Wait until the lease is renewed, and check that it names `versions`."""
    path = store.root / "served" / "g.json"
    before = Lease.model_validate_json(path.read_bytes()).renewed_unix_s
    await until(lambda: Lease.model_validate_json(path.read_bytes()).renewed_unix_s > before)
    assert store.leased() == versions


async def test_a_store_that_cannot_be_written_can_still_be_served(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    _, digest = publish(store, V1)
    (store.root / "served").write_text("not a directory")
    assert (await put(switcher, V1, digest)).version == V1
    assert switcher.not_ready is None


# -- admission -------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[RolloutRequest, type[TandemError], str]] = [
    (request(min_version=V1), StalePolicy, r"got min_version 1\.1; this generator serves 0\.0"),
    (request(*range(30), max_tokens=3), BadRequest, "a prompt of 30 tokens and max_tokens 3, expected at most 32"),
    (request(5, 100), BadRequest, "got token id 100, expected ids below the vocabulary's size 100"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), REFUSED, ids=[error.__name__ for _, error, _ in REFUSED])
async def test_an_impossible_request_is_refused_before_sampling(
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
