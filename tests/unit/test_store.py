"""A version in the store is complete or absent. Altered versions are refused. Versions in use are not deleted."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.weights import FINGERPRINT, edit_manifest, publish, shard, tensors
from tandem_protocol.errors import StoreError, StoreLocked, WeightsNotVisible, WeightsRefused
from tandem_protocol.manifest import MANIFEST_NAME
from tandem_protocol.store import LEASE_S, WeightStore
from tandem_protocol.version import Version

FILE_MODULES = {"store", "retired", "pathlib", "shutil", "numpy"}  # the last is safetensors.numpy
V1, V2, V3 = Version(1, 1), Version(2, 1), Version(3, 1)


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "weights")


def assert_complete(store: WeightStore, version: Version) -> None:
    """Check that `version` is what `publish` wrote."""
    manifest, _ = store.read(version)
    store.verify(manifest)
    loaded = {k: v for entry in manifest.files for k, v in load_file(store.directory(version) / entry.name).items()}
    assert loaded.keys() == tensors(version.step).keys()
    assert all(np.array_equal(tensor, tensors(version.step)[name]) for name, tensor in loaded.items())


def dies_at(moment: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child process, and kill it before its `moment`-th call from a module that handles files.

    Returns:
        False if `action` ended before that.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        if event == "c_call" and Path(frame.f_code.co_filename).stem in FILE_MODULES:
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.setprofile(count)
        action()
    finally:
        os._exit(0)


def test_a_writer_killed_at_any_moment_leaves_only_complete_versions(tmp_path: Path) -> None:
    latest_seen = []
    for moment in itertools.count(1):
        store = WeightStore(tmp_path / str(moment))
        publish(store, V1)

        def publish_and_retain(store: WeightStore = store) -> None:
            with store.writer("the one that dies"):
                publish(store, V2)
                store.retain(1)

        died = dies_at(moment, publish_and_retain)
        latest = store.latest()
        assert latest in store.versions()
        for version in store.versions():
            assert_complete(store, version)
        with store.writer("its successor"):
            publish(store, V3)
        assert store.latest() == V3
        assert_complete(store, V3)
        assert not list(store.root.glob(".*")) + list((store.root / "versions").glob(".*"))
        latest_seen.append(latest)
        if not died:
            break
    assert latest_seen == sorted(latest_seen, key=lambda version: version or V1)
    assert (latest_seen[0], latest_seen[-1]) == (V1, V2)


def test_a_published_version_is_readable_and_latest(store: WeightStore) -> None:
    assert store.latest() is None
    assert store.versions() == []
    written = publish(store, V1)
    assert store.read(V1) == written
    assert_complete(store, V1)
    assert store.latest() == V1
    publish(store, Version(0, 2))
    assert store.latest() == Version(0, 2)
    assert store.versions() == [V1, Version(0, 2)]
    assert store.next_attempt() == 3


def test_every_file_is_flushed_once_before_the_version_is_visible(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr("tandem_protocol.store.fsync", lambda path: flushed.append(path.name))
    publish(store, V1)
    monkeypatch.undo()
    shards = [file.name for file in store.read(V1)[0].files]
    assert flushed[: flushed.index("versions")] == [*shards, ".staging-1.1"]
    flushed.clear()
    monkeypatch.setattr("tandem_protocol.store.fsync", lambda path: flushed.append(path.name))
    publish(store, V2, digests={shards[0]: "of a writer that has flushed it"})
    assert flushed[: flushed.index("versions")] == [*shards[1:], ".staging-2.1"]


def test_a_version_is_never_overwritten(store: WeightStore) -> None:
    publish(store, V1)
    with pytest.raises(StoreError, match=r"version 1\.1 already exists"):
        publish(store, V1)
    assert_complete(store, V1)


def test_a_missing_version_is_reported_with_the_newest_existing_ones(store: WeightStore) -> None:
    with pytest.raises(WeightsNotVisible, match="none"):
        store.read(V1)
    publish(store, V1)
    with pytest.raises(WeightsNotVisible, match=r"no version 2\.1 .*1\.1"):
        store.read(V2)


def test_directories_that_are_not_versions_are_ignored(store: WeightStore) -> None:
    publish(store, V1)
    copy = store.directory(V1).with_suffix(".1.bak")
    shutil.copytree(store.directory(V1), copy)
    assert store.versions() == [V1]
    publish(store, V2)
    assert store.retain(1) == [V1]
    assert copy.is_dir()


def test_the_manifest_digest_differs_between_two_runs_with_equal_weights(store: WeightStore, tmp_path: Path) -> None:
    _, ours = publish(store, V1, run="ours")
    _, theirs = publish(WeightStore(tmp_path / "theirs"), V1, run="theirs")
    assert ours != theirs


def truncate(store: WeightStore) -> None:
    os.truncate(shard(store, V1), shard(store, V1).stat().st_size - 1)


def flip_a_byte(store: WeightStore) -> None:
    data = bytearray(shard(store, V1).read_bytes())
    data[-1] ^= 1
    shard(store, V1).write_bytes(data)


def remove_a_file(store: WeightStore) -> None:
    shard(store, V1).unlink()


def swap_for_a_directory(store: WeightStore) -> None:
    path = shard(store, V1)
    path.unlink()
    path.mkdir()


def lie_about_shapes(store: WeightStore) -> None:
    manifest, _ = store.read(V1)
    table = [tensor.model_dump() | {"shape": (1, 1)} for tensor in manifest.tensors]
    edit_manifest(store, V1, {"tensors": table})


def leave_out_a_shard(store: WeightStore) -> None:
    manifest, _ = store.read(V1)
    edit_manifest(store, V1, {"files": [entry.model_dump() for entry in manifest.files[1:]]})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"shard-00000\.safetensors: got \d+ bytes, expected \d+"),
        (flip_a_byte, r"shard-00000\.safetensors: got xxh3-128 \w{32}, expected \w{32}"),
        (remove_a_file, r"shard-00000\.safetensors: got .*No such file"),
        (swap_for_a_directory, r"shard-00000\.safetensors: got"),
        (lie_about_shapes, "tensor table"),
        (leave_out_a_shard, "tensor table"),
    ],
)
def test_altered_weights_are_refused_with_the_file_and_the_fix(
    store: WeightStore, damage: Callable[[WeightStore], None], message: str
) -> None:
    publish(store, V1)
    assert_complete(store, V1)
    damage(store)
    manifest, _ = store.read(V1)
    with pytest.raises(WeightsRefused, match=f"{message}.*old version is still served.*publish"):
        store.verify(manifest)


def test_every_file_is_verified(store: WeightStore) -> None:
    manifest, _ = publish(store, V1)
    for file in manifest.files:
        path = store.directory(V1) / file.name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"x")
        with pytest.raises(WeightsRefused, match=file.name):
            store.verify(manifest)
        path.write_bytes(whole)
    store.verify(manifest)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_text(path.read_text().replace('"run"', '"rum"')),
    ],
    ids=["absent", "empty", "truncated", "unknown key"],
)
def test_a_damaged_manifest_is_refused(store: WeightStore, damage: Callable[[Path], None]) -> None:
    publish(store, V1)
    damage(store.directory(V1) / MANIFEST_NAME)
    with pytest.raises(WeightsRefused, match=r"manifest of version 1\.1 cannot be read"):
        store.read(V1)


def test_a_manifest_of_another_version_is_refused(store: WeightStore) -> None:
    publish(store, V1)
    shutil.copytree(store.directory(V1), store.directory(V2))
    with pytest.raises(WeightsRefused, match=r"got the manifest of version 1\.1, expected 2\.1"):
        store.read(V2)


def test_a_damaged_latest_file_is_reported_with_the_fix(store: WeightStore) -> None:
    publish(store, V1)
    (store.root / "LATEST").write_text("newest")
    with pytest.raises(StoreError, match=r"got version 'newest'.*write the newest name"):
        store.latest()


def test_a_second_writer_is_refused_with_the_name_of_the_first(store: WeightStore) -> None:
    for holder in ("trainer-a pid 7", "trainer-b"):
        with store.writer(holder), pytest.raises(StoreLocked, match=f"written by {holder};.*trainer-c"):
            store.writer("trainer-c").__enter__()


def test_leased_versions_and_latest_are_kept(store: WeightStore) -> None:
    for step in range(6):
        publish(store, Version(step, 1))
    store.lease("gen-0", (V1,))
    store.lease("gen-1", (V1, V3))
    assert store.retain(2) == [Version(0, 1), V2]
    assert store.versions() == [V1, V3, Version(4, 1), Version(5, 1)]
    store.lease("gen-1", ())
    assert store.leased() == {V1}
    assert store.retain(1) == [V3, Version(4, 1)]
    assert_complete(store, V1)
    assert len(list((store.root / "versions").iterdir())) == 2


def test_latest_is_kept_even_if_a_newer_version_exists(store: WeightStore) -> None:
    publish(store, V1)
    publish(store, V2)
    (store.root / "LATEST").write_text("1.1")
    assert store.retain(1) == []


def test_a_lease_that_is_not_renewed_expires(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.lease("gen-0", (V1,))
    leased_at = time.time()
    monkeypatch.setattr(time, "time", lambda: leased_at + LEASE_S / 2)
    assert store.leased() == {V1}
    monkeypatch.setattr(time, "time", lambda: leased_at + LEASE_S + 1)
    assert store.leased() == set()


def test_leases_of_generators_that_are_gone_are_removed(store: WeightStore) -> None:
    publish(store, V1)
    for name in ("here", "gone", "paused"):
        store.lease(name, (V1,))
    (store.root / "served/.killed.json.7").write_text("{")
    for name, hours in (("gone.json", 2.0), (".killed.json.7", 2.0), ("paused.json", 0.5)):
        long_ago = time.time() - 3600 * hours
        os.utime(store.root / "served" / name, (long_ago, long_ago))
    store.retain(1)
    assert {path.name for path in (store.root / "served").iterdir()} == {"here.json", "paused.json"}


def test_a_full_volume_is_reported_before_anything_is_written(small_volume: Path) -> None:
    store = WeightStore(small_volume)
    publish(store, V1)
    with (
        pytest.raises(StoreError, match=r"cannot publish version 2\.1 .*MB free, expected 1\.0 MB.*enlarge"),
        store.staging(V2, needs_bytes=1_000_000),
    ):
        pytest.fail("the volume is too small")
    assert store.versions() == [V1]


def overfill(store: WeightStore, filler_bytes: int | None) -> None:
    with store.staging(V2, needs_bytes=0) as staged:
        save_file(tensors(2), staged / "shard-00000.safetensors")
        free_bytes = shutil.disk_usage(store.root).free
        (staged / "filler").write_bytes(bytes(filler_bytes or free_bytes))
        store.commit(staged, V2, run="test", fingerprint=FINGERPRINT)


@pytest.mark.parametrize("filler_bytes", [1 << 20, None], ids=["shard does not fit", "manifest does not fit"])
def test_a_volume_that_fills_up_while_publishing_keeps_existing_versions(
    small_volume: Path, filler_bytes: int | None
) -> None:
    store = WeightStore(small_volume)
    publish(store, V1)
    with pytest.raises(StoreError, match=r"cannot publish version 2\.1 .*No space left.*enlarge"):
        overfill(store, filler_bytes)
    assert store.versions() == [V1]
    assert store.latest() == V1
    assert_complete(store, V1)
    publish(store, V2)
    assert_complete(store, V2)


def test_unrelated_files_in_the_store_are_ignored(store: WeightStore) -> None:
    publish(store, Version(1, 1))
    shutil.copytree(store.directory(Version(1, 1)), store.root / "versions" / "5.0")
    (store.root / "served").mkdir()
    (store.root / "served" / "other.json").write_text("{}")
    assert store.versions() == [Version(1, 1)]
    assert store.leased() == set()
    assert store.retain(1) == []
