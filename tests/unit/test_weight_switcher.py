"""WeightSwitcher with a scripted engine: which version is served after a switch succeeds, is refused or fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.engines import ScriptedEngine, Start, WatchedStore, put, request, until, version_that_answers
from support.weights import FINGERPRINT, edit_manifest, publish, publish_adapter, shard
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.errors import (
    NotReady,
    OlderVersion,
    PolicyTorn,
    SwitchFailed,
    SwitchInProgress,
    WeightsNotVisible,
    WeightsRefused,
)
from tandem_protocol.messages import ServedWeights, SwitchMode
from tandem_protocol.version import BASE, Version

V1, V2 = Version(1, 1), Version(2, 1)
BROKEN = RuntimeError("the device is lost")


# -- a switch --------------------------------------------------------------------------------------------------------


async def test_a_switch_verifies_pauses_loads_and_resumes_in_this_order(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher = await start()
    engine.at_resume = lambda: engine.calls.append(f"while {switcher.version} serves")
    served = await put(switcher, V1, publish(store, V1)[1], SwitchMode.IN_FLIGHT)
    assert engine.calls == ["start", "verify 1.1", "pause in_flight", "load 1.1", "resume", "while 1.1 serves"]
    assert served.version == switcher.served.version == V1
    assert served.timings is not None
    assert await version_that_answers(switcher) == V1


async def test_a_switch_to_the_served_version_does_not_call_the_engine(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher = await start()
    _, digest = publish(store, V1)
    await put(switcher, V1, digest)
    engine.calls.clear()
    assert await put(switcher, V1, digest) == ServedWeights(version=V1, manifest_digest=digest, timings=None)
    assert engine.calls == []


async def test_an_older_version_is_refused_but_a_later_attempt_is_accepted(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    _, digest = publish(store, V1)
    await put(switcher, V2, publish(store, V2)[1])
    with pytest.raises(
        OlderVersion, match=r"got version 1\.1, expected one that is newer than the served version 2\.1"
    ):
        await put(switcher, V1, digest)
    assert switcher.version == V2
    resumed = Version(1, 2)
    await put(switcher, resumed, publish(store, resumed)[1])
    assert switcher.version == resumed


async def test_a_second_switch_is_refused_while_one_is_running(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher = await start()
    _, first = publish(store, V1)
    _, second = publish(store, V2)
    engine.may_load.clear()
    switch = asyncio.create_task(put(switcher, V1, first))
    await until(lambda: "load 1.1" in engine.calls)
    with pytest.raises(SwitchInProgress):
        await put(switcher, V2, second)
    engine.may_load.set()
    assert (await switch).version == V1


# -- versions that are refused before the engine is touched ----------------------------------------------------------


async def refused(switcher: WeightSwitcher, version: Version, digest: str) -> str:
    """Check that the version is refused and the base weights are still served. Returns the message."""
    with pytest.raises(WeightsRefused) as error:
        await put(switcher, version, digest)
    assert [call for call in switcher.engine.calls if not call.startswith("verify")] == ["start"]  # type: ignore[attr-defined]  # the scripted engine's
    assert switcher.not_ready is None
    assert await version_that_answers(switcher) == BASE
    return str(error.value)


async def test_a_manifest_of_another_run_is_refused(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    publish(store, V1)
    assert f"expected {'0' * 32}. Another run" in await refused(switcher, V1, "0" * 32)


async def test_weights_with_another_fingerprint_are_refused(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    publish(store, V1)
    edit_manifest(store, V1, {"fingerprint": {"config": "another", "tokenizer": "70", "parameters": "9a"}})
    assert "another model: its config differs" in await refused(switcher, V1, store.read(V1)[1])


async def test_another_parameter_table_is_refused_with_the_differences(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    engine.facts = engine.facts._replace(shapes={"embed.weight": (8, 5), "head.weight": (1,)})
    switcher = await start()
    _, digest = publish(store, V1)
    assert (
        "3 parameters differ: embed.weight: trainer (8, 4), generator (8, 5); head.weight: trainer none, generator "
        "(1,); norm.weight: trainer (4,), generator none"
    ) in await refused(switcher, V1, digest)


async def test_a_version_that_holds_a_tensor_twice_is_refused(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    manifest, _ = publish(store, V1)
    twice = manifest.tensors[0].model_copy(update={"file": manifest.tensors[1].file})
    edit_manifest(store, V1, {"tensors": [t.model_dump() for t in (*manifest.tensors, twice)]})
    assert "its files hold embed.weight more than once" in await refused(switcher, V1, store.read(V1)[1])


async def test_without_a_parameter_table_no_version_is_accepted(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    engine.facts = engine.facts._replace(shapes={})
    switcher = await start()
    _, digest = publish(store, V1)
    assert "2 parameters differ: embed.weight: trainer (8, 4), generator none" in await refused(switcher, V1, digest)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "of kind lora, expected kind full. Fix: with trainer.lora, set generator.vllm"),
        ({"kinds": {"lora"}, "max_lora_rank": 4}, "an adapter of rank 8, expected at most 4. Fix: raise"),
        (
            {"kinds": {"lora"}, "max_lora_rank": 8, "fingerprint": FINGERPRINT.model_copy(update={"parameters": "0"})},
            "an adapter for a model with other parameters",
        ),
    ],
)
async def test_an_adapter_that_does_not_fit_is_refused_with_the_fix(
    start: Start, engine: ScriptedEngine, store: WatchedStore, facts: dict[str, Any], words: str
) -> None:
    engine.facts = engine.facts._replace(**facts)
    switcher = await start()
    _, digest = publish_adapter(store, V1, rank=8)
    assert words in await refused(switcher, V1, digest)


async def test_a_full_version_is_refused_by_a_generator_that_serves_adapters(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    engine.facts = engine.facts._replace(kinds=frozenset({"lora"}))
    switcher = await start()
    _, digest = publish(store, V1)
    assert "of kind full, expected kind lora" in await refused(switcher, V1, digest)


async def test_adapters_switch_in_flight_except_the_first(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    engine.facts = engine.facts._replace(kinds=frozenset({"lora"}), max_lora_rank=8)
    switcher = await start()
    for version in (V1, V2):
        _, digest = publish_adapter(store, version, rank=8)
        await put(switcher, version, digest, SwitchMode.IN_FLIGHT)
    assert [call for call in engine.calls if call.startswith("pause")] == ["pause abort", "pause in_flight"]
    assert switcher.version == V2


async def test_a_damaged_shard_is_refused(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    _, digest = publish(store, V1)
    shard(store, V1).write_bytes(b"damaged")
    assert "got 7 bytes, expected" in await refused(switcher, V1, digest)


async def test_a_version_that_appears_late_is_waited_for(start: Start, store: WatchedStore) -> None:
    switcher = await start()
    _, digest = publish(store, V1)
    late = store.directory(V1).rename(store.root / "late")
    store.looked.clear()
    switch = asyncio.create_task(put(switcher, V1, digest))
    await store.looked.wait()
    late.rename(store.directory(V1))
    assert (await switch).version == V1


async def test_a_version_that_never_appears_is_refused(start: Start) -> None:
    switcher = await start(visible_timeout_s=0.1)
    with pytest.raises(WeightsNotVisible, match=r"got no version 1\.1"):
        await put(switcher, V1, "0" * 32)
    assert await version_that_answers(switcher) == BASE


async def test_a_stop_ends_the_wait_for_a_version(start: Start, store: WatchedStore) -> None:
    switcher = await start(visible_timeout_s=600.0)
    switch = asyncio.create_task(put(switcher, V1, "0" * 32))
    await store.looked.wait()
    switcher.stop()
    async with asyncio.timeout(60):
        with pytest.raises(WeightsNotVisible):
            await switch
    with pytest.raises(NotReady, match="it is stopping"):
        switcher.rollouts(request())


# -- switches that fail half-way -------------------------------------------------------------------------------------


async def test_a_failed_load_is_rolled_back(start: Start, engine: ScriptedEngine, store: WatchedStore) -> None:
    switcher = await start()
    _, good = publish(store, V1)
    _, bad = publish(store, V2)
    await put(switcher, V1, good)
    engine.calls.clear()
    engine.failures = [BROKEN]
    with pytest.raises(
        SwitchFailed, match=r"2\.1 failed half-way \(the device is lost\); version 1\.1 was loaded again"
    ):
        await put(switcher, V2, bad)
    assert engine.calls == ["verify 2.1", "pause drain", "load 2.1", "load 1.1", "resume"]
    assert switcher.not_ready is None
    assert switcher.served.manifest_digest == good
    assert await version_that_answers(switcher) == V1
    assert (await put(switcher, V2, bad)).version == V2


async def test_a_load_that_takes_too_long_is_rolled_back(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher = await start(switch_timeout_s=0.05)
    _, digest = publish(store, V1)
    engine.may_load.clear()
    switch = asyncio.create_task(put(switcher, V1, digest))
    await until(lambda: "load 0.0" in engine.calls)
    assert switcher.not_ready is not None
    assert "1.1 failed half-way; version 0.0 is being loaded again" in switcher.not_ready
    engine.may_load.set()
    with pytest.raises(SwitchFailed):
        await switch
    assert switcher.not_ready is None


async def test_a_failed_rollback_leaves_the_policy_torn(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher = await start(canary_every_s=0.01)
    _, digest = publish(store, V1)
    engine.computes.clear()
    await engine.checked.wait()
    engine.failures = [BROKEN, RuntimeError("still lost")]
    with pytest.raises(PolicyTorn, match=r"\(the device is lost\), and so did loading 0\.0 again \(still lost\)"):
        await put(switcher, V1, digest)
    assert switcher.failed.is_set()
    assert engine.calls[-1] == "load 0.0", "a torn engine must stay paused"
    engine.computes.set()  # a canary that is already running succeeds
    await engine.computed.wait()
    assert switcher.not_ready == "torn between versions 1.1 and 0.0; restarting"
    with pytest.raises(NotReady, match="torn"):
        switcher.rollouts(request())


async def test_a_pause_that_takes_too_long_keeps_the_old_version(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    switcher = await start(switch_timeout_s=0.05)
    _, digest = publish(store, V1)
    engine.may_pause.clear()
    with pytest.raises(SwitchFailed, match=r"did not pause for version 1\.1 within 0\.05 s.*use mode in_flight"):
        await put(switcher, V1, digest)
    assert engine.calls == ["start", "verify 1.1", "pause drain", "resume"]
    assert await version_that_answers(switcher) == BASE
