"""With several workers, a load that fails on some of them is rolled back on all of them.

The executor and the workers are vLLM's. What the workers load is scripted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from support.engines import put
from support.weights import publish, publish_adapter
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.config import ConfigError
from tandem_protocol.config.generator import GeneratorConfig
from tandem_protocol.errors import PolicyTorn, SwitchFailed
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

if TYPE_CHECKING:
    from support.several_workers import SeveralEngines, Transfer

pytestmark = pytest.mark.vllm

V1, V2, V3 = Version(1, 1), Version(2, 1), Version(3, 1)
ENGINES, WORKERS = 2, 3
FAILS = [
    pytest.param(lambda engine, rank: rank == 0, id="the first worker of each engine"),
    pytest.param(lambda engine, rank: rank == WORKERS - 1, id="the last worker of each engine"),
    pytest.param(lambda engine, rank: (engine, rank) == (1, 1), id="one worker of the second engine"),
    pytest.param(lambda engine, rank: True, id="all workers"),
]
Fails = Callable[[int, int], bool]


@pytest.fixture
def client() -> Iterator[SeveralEngines]:
    pytest.importorskip("vllm")
    from support.several_workers import SeveralEngines, without_config

    with without_config():
        yield SeveralEngines(ENGINES, WORKERS)


def transfers(client: SeveralEngines, fails: Fails = lambda engine, rank: True) -> list[Transfer]:
    return [
        worker.weight_transfer_engine
        for number, workers in enumerate(client.workers)
        for worker in workers
        if fails(number, worker.rank)
    ]


def held(client: SeveralEngines, store: WeightStore) -> set[str]:
    """Return the names of the versions that the workers hold, and "" if one holds a mixture."""
    paths = [path for transfer in transfers(client) for path in transfer.holds or [""]]
    return {Path(path).relative_to(store.root / "versions").parts[0] if path else "" for path in paths}


def switcher_of(client: SeveralEngines, store: WeightStore, kind: Literal["full", "lora"] = "full") -> WeightSwitcher:
    from support.several_workers import engine_of

    config = GeneratorConfig(generator_id="g", visible_timeout_s=5.0, switch_timeout_s=60.0)
    return WeightSwitcher(engine_of(client, kind=kind), store, config)


@pytest.mark.parametrize("fails", FAILS)
async def test_all_workers_hold_the_old_version_after_a_load_that_fails_on_some(
    client: SeveralEngines, tmp_path: Path, fails: Fails
) -> None:
    store = WeightStore(tmp_path)
    switcher = switcher_of(client, store)
    await put(switcher, V1, publish(store, V1)[1])
    digest = publish(store, V2)[1]
    for _ in range(2):
        for transfer in transfers(client, fails):
            transfer.failures = 1
        with pytest.raises(SwitchFailed, match=r"2\.1 failed half-way \(the device is lost\); version 1\.1 was loaded"):
            await put(switcher, V2, digest)
        assert held(client, store) == {store.directory(V1).name}
        assert client.version == "1.1"
        assert switcher.not_ready is None
    await put(switcher, V3, publish(store, V3)[1])
    assert held(client, store) == {store.directory(V3).name}


async def test_an_error_without_a_message_is_an_error(client: SeveralEngines, tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    switcher = switcher_of(client, store)
    await put(switcher, V1, publish(store, V1)[1])
    for transfer in transfers(client):
        transfer.failures, transfer.error = 1, ""
    with pytest.raises(SwitchFailed, match=r"2\.1 failed half-way \(ValueError:\)"):
        await put(switcher, V2, publish(store, V2)[1])
    assert held(client, store) == {store.directory(V1).name}


@pytest.mark.parametrize("fails", FAILS)
async def test_a_rollback_that_fails_on_some_workers_ends_the_generator(
    client: SeveralEngines, tmp_path: Path, fails: Fails
) -> None:
    store = WeightStore(tmp_path)
    switcher = switcher_of(client, store)
    await put(switcher, V1, publish(store, V1)[1])
    for transfer in transfers(client, fails):
        transfer.failures = 2
    with pytest.raises(PolicyTorn):
        await put(switcher, V2, publish(store, V2)[1])
    assert switcher.failed.is_set()


@pytest.mark.parametrize("fails", FAILS)
async def test_an_adapter_that_fails_on_some_workers_is_rolled_back_on_all(
    client: SeveralEngines, tmp_path: Path, fails: Fails
) -> None:
    store = WeightStore(tmp_path)
    switcher = switcher_of(client, store, "lora")
    await put(switcher, V1, publish_adapter(store, V1, rank=2)[1])
    for transfer in transfers(client, fails):
        transfer.failures = 1
    with pytest.raises(SwitchFailed, match=r"2\.1 failed half-way \(the device is lost\); version 1\.1 was loaded"):
        await put(switcher, V2, publish_adapter(store, V2, rank=2)[1])
    assert held(client, store) == {store.directory(V1).name}


@pytest.mark.parametrize("fails", FAILS)
async def test_a_model_that_some_workers_refuse_is_refused_with_their_reason(
    client: SeveralEngines, fails: Fails
) -> None:
    from support.several_workers import engine_of

    for transfer in transfers(client, fails):
        transfer.failures = 1
    with pytest.raises(ConfigError, match=r"^shared\.model: this kind of model$"):
        await engine_of(client).start()
