"""A generator switches between deltas: roll back, restart, a base that is lost. It never serves anything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.delta_versions import SHAPES, Replica, Trainer
from support.engines import ScriptedEngine, Start, WatchedStore, put
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.errors import SwitchFailed, WeightsRefused
from tandem_protocol.manifest import Manifest
from tandem_protocol.version import BASE, Version

Published = list[tuple[Manifest, str]]
V1, V2, V3, V4 = (Version(step, 1) for step in range(1, 5))


class LoadingEngine(ScriptedEngine):
    """Engine that notes the bytes of every file that it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = self.facts._replace(shapes=SHAPES)
        self.loaded: tuple[Path, ...] = ()

    async def load_weights(self, version: Version, files: tuple[Path, ...]) -> None:  # type: ignore[override]  # narrower: the switcher passes a tuple
        await super().load_weights(version, files)
        self.loaded = files


@pytest.fixture
async def engine() -> LoadingEngine:
    return LoadingEngine()


@pytest.fixture
def trainer(store: WatchedStore) -> Trainer:
    return Trainer(store)


@pytest.fixture
def versions(trainer: Trainer) -> Published:
    return trainer.steps(3)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Path]:
    return {"materialize_dir": tmp_path / "local"}


async def serve(switcher: WeightSwitcher, versions: Published) -> None:
    for manifest, digest in versions:
        if manifest.version > switcher.version:
            await put(switcher, manifest.version, digest)


async def test_a_failed_load_is_rolled_back_to_the_files_of_the_delta_that_was_served(
    start: Start, engine: LoadingEngine, trainer: Trainer, settings: dict[str, Path], store: WatchedStore
) -> None:
    switcher = await start(**settings)
    versions = trainer.steps(3)
    await serve(switcher, versions[:3])
    engine.failures = [RuntimeError("the device is lost")]
    with pytest.raises(SwitchFailed, match=r"version 3\.1 was loaded again"):
        await put(switcher, V4, versions[3][1])
    assert trainer.is_right(engine.loaded, V3)
    await put(switcher, V4, versions[3][1])
    assert trainer.is_right(engine.loaded, V4)
    assert switcher.version == engine.holds == V4


async def test_a_generator_that_starts_makes_latest_out_of_the_chain(
    start: Start,
    engine: LoadingEngine,
    trainer: Trainer,
    versions: Published,
    settings: dict[str, Path],
) -> None:
    assert len(versions) == 4
    switcher = await start(**settings)
    assert switcher.version == V4
    assert trainer.is_right(engine.loaded, V4)


async def test_its_files_are_gone_when_it_has_ended(
    start: Start, versions: Published, settings: dict[str, Path], tmp_path: Path
) -> None:
    switcher = await start(**settings)
    assert switcher.version == V4
    assert [*(tmp_path / "local").iterdir()]
    await switcher.close()
    assert not [*(tmp_path / "local").iterdir()]


async def test_a_generator_that_starts_removes_what_a_killed_one_of_the_same_name_has_left(
    start: Start, trainer: Trainer, settings: dict[str, Path], tmp_path: Path
) -> None:
    left = tmp_path / "local/tandem-g/000003.1-0123"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"left")
    trainer.publish(Version(1, 1), full=True)
    switcher = await start(**settings)
    assert switcher.version == V1, "a complete version, for which no files are made"
    assert not left.exists()


async def test_a_generator_that_starts_leaves_the_files_of_another_that_runs_and_says_so(
    start: Start, trainer: Trainer, settings: dict[str, Path], store: WatchedStore, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    running = Replica(store, tmp_path / "local")
    for manifest, digest in trainer.steps(1):
        running.switch(manifest, digest)
    assert await start(**settings)
    assert trainer.is_right(running.files, V2)
    assert "tandem-g cannot be removed: another process uses the folder" in caplog.text


async def test_a_generator_that_starts_without_the_base_serves_the_complete_files_when_they_come(
    start: Start, engine: LoadingEngine, trainer: Trainer, versions: Published,
    store: WatchedStore, settings: dict[str, Path],
) -> None:  # fmt: skip
    shutil.rmtree(store.directory(V1))
    switcher = await start(**settings)
    assert (switcher.version, switcher.not_ready) == (BASE, None)
    assert engine.loaded == ()
    manifest, digest = versions[3]
    with pytest.raises(WeightsRefused, match=r"version 1\.1 is missing"):
        await put(switcher, V4, digest)
    trainer.complete(manifest)
    await put(switcher, V4, digest)
    assert trainer.is_right(engine.loaded, V4)


async def test_a_replica_on_several_hosts_loads_only_complete_versions_from_the_store(
    start: Start, engine: LoadingEngine, trainer: Trainer, settings: dict[str, Path], tmp_path: Path
) -> None:
    engine.facts = engine.facts._replace(one_host=False)
    switcher = await start(**settings)
    versions = trainer.steps(1)
    await put(switcher, V1, versions[0][1])
    manifest, digest = versions[1]
    with pytest.raises(WeightsRefused, match=r"several hosts.*trainer\.publish\.delta: never"):
        await put(switcher, V2, digest)
    trainer.complete(manifest)
    for delta in manifest.deltas.values():  # nobody who loads the complete files reads them
        (trainer.store.directory(V2) / delta.name).unlink()
    await put(switcher, V2, digest)
    assert trainer.is_right(engine.loaded, V2)
    assert not (tmp_path / "local").exists()


async def test_deltas_of_another_model_are_an_error_at_the_start(
    start: Start, engine: LoadingEngine, versions: Published, settings: dict[str, Path]
) -> None:
    assert len(versions) == 4
    engine.facts = engine.facts._replace(shapes={"another": (1,)})
    with pytest.raises(WeightsRefused, match="none of the 4 versions"):
        await start(**settings)
