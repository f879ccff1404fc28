"""A store whose volume fails, is emptied or mounted again, cannot delete, or is seen by hosts with other clocks."""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from support.weights import publish, tensors
from tandem_protocol.errors import StoreError
from tandem_protocol.store import LEASE_S, WeightStore
from tandem_protocol.version import Version

V1, V2, V3 = Version(1, 1), Version(2, 1), Version(3, 1)


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "weights")


def test_a_lease_from_the_future_expires_after_a_clock_has_gone_back(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.lease("gen-0", (V1,))
    leased_at = time.time()
    monkeypatch.setattr(time, "time", lambda: leased_at - LEASE_S / 2)
    assert store.leased() == {V1}, "the clocks of two hosts differ a little"
    monkeypatch.setattr(time, "time", lambda: leased_at - LEASE_S - 1)
    assert store.leased() == set()


@pytest.fixture
def keeps_open_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of directories that cannot be removed, as on NFS while a process has a file of it open."""
    names: list[str] = []
    rmdir = os.rmdir

    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        if any(name in str(path) for name in names):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", refuse)
    return names


def test_a_version_that_cannot_be_deleted_now_is_hidden_and_deleted_later(
    store: WeightStore, keeps_open_files: list[str]
) -> None:
    for version in (V1, V2, V3):
        publish(store, version)
    keeps_open_files.append("000001.1")
    assert store.retain(1) == [V1, V2]
    assert store.versions() == [V3]
    assert len([*store.root.glob("versions/.*")]) == 1
    assert store.retain(1) == []
    keeps_open_files.clear()
    assert store.retain(1) == []
    assert not [*store.root.glob("versions/.*")]


def test_a_version_that_vanishes_while_it_is_deleted_does_not_end_the_run(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (V1, V2, V3):
        publish(store, version)
    latest = store.latest

    def emptied() -> Version | None:  # behind the listing of the versions
        found = latest()
        shutil.rmtree(store.directory(V1))
        return found

    monkeypatch.setattr(store, "latest", emptied)
    assert store.retain(1) == [V1, V2]
    assert store.versions() == [V3]


def test_a_volume_that_fails_while_versions_are_deleted_is_named_with_the_fix(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (V1, V2):
        publish(store, version)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StoreError, match=r"old versions cannot be deleted from .*Input/output error.*is mounted"):
        store.retain(1)


def test_a_leftover_that_cannot_be_deleted_does_not_keep_the_next_writer_out_and_is_in_no_version(
    store: WeightStore, keeps_open_files: list[str]
) -> None:
    leftover = store.root / f"versions/.staging-{V1}"
    leftover.mkdir(parents=True)
    save_file(tensors(7), leftover / "shard-99999.safetensors")
    keeps_open_files.append("1.1")
    with store.writer("test"):
        publish(store, V1)
        store.verify(store.read(V1)[0])
        assert len(store.read(V1)[0].files) == 2
    keeps_open_files.clear()
    with store.writer("test"):
        assert [path.name for path in (store.root / "versions").iterdir()] == ["000001.1"]


def test_a_staging_folder_that_another_process_still_writes_is_hidden_and_deleted_later(
    store: WeightStore, keeps_open_files: list[str]
) -> None:
    with store.writer("test"):
        publish(store, V1)
        keeps_open_files.append("1.1-complete")
        with store.staging(V1, needs_bytes=0, completes=True) as staged:
            (staged / "model.safetensors").write_bytes(b"half of i")
        assert not store.is_being_completed(V1)
        with store.staging(V1, needs_bytes=0, completes=True) as staged:
            assert not [*staged.iterdir()]
        keeps_open_files.clear()
        store.retain(1)
    assert [path.name for path in (store.root / "versions").iterdir()] == ["000001.1"]


def test_a_reader_of_an_emptied_volume_is_asked_for_nothing(store: WeightStore) -> None:
    with store.writer("test"):
        publish(store, V1)
        with store.staging(V1, needs_bytes=0, completes=True):
            assert store.is_being_completed(V1)
            shutil.rmtree(store.root)
            assert not store.is_being_completed(V1)


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_volume_that_was_emptied_or_mounted_again_is_not_written_without_its_lock(
    store: WeightStore, is_taken: bool
) -> None:
    with store.writer("the old trainer"), ExitStack() as stack:
        publish(store, V1)
        shutil.rmtree(store.root)
        other = WeightStore(store.root)
        if is_taken:
            stack.enter_context(other.writer("another trainer"))
        with pytest.raises(StoreError, match=r"WRITER is not the file.*same command again"):
            publish(store, V2)
        assert other.versions() == []
        assert not [*store.root.glob("versions/.*")]
    with store.writer("the old trainer"):
        publish(store, V3)
    assert store.latest() == V3


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_a_volume_that_fails_is_reported_with_the_fix(store: WeightStore, moment: str) -> None:
    publish(store, V1)

    def lose() -> None:
        (store.root / "versions").rename(store.root / "lost")

    if moment == "before":
        lose()

    def write() -> None:
        with store.staging(V2, needs_bytes=0) as staged:
            lose()
            (staged / "shard-00000.safetensors").write_bytes(b"")

    with pytest.raises(StoreError, match=r"cannot publish version 2\.1 .*No such file.*Fix: check that the weights"):
        write()
