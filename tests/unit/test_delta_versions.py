"""Delta versions in the store and on a generator: exactly the published bytes are served, or nothing."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from support.delta_versions import SHAPES, Replica, Trainer, everything
from tandem_protocol.chains import closure, is_complete
from tandem_protocol.errors import WeightsRefused
from tandem_protocol.manifest import MANIFEST_NAME
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.published_copy import Plan, PublishedCopy


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(WeightStore(tmp_path / "weights"))


@pytest.fixture
def replica(trainer: Trainer, tmp_path: Path) -> Replica:
    return Replica(trainer.store, tmp_path / "local")


def late(trainer: Trainer, tmp_path: Path) -> Replica:
    return Replica(trainer.store, tmp_path / "local", "late")


def size_of(store: WeightStore, version: Version) -> int:
    return sum(path.stat().st_size for path in store.directory(version).glob("*.safetensors*"))


# -- what is right ---------------------------------------------------------------------------------------------------


def test_200_deltas_are_bit_exact_for_a_replica_that_follows_and_for_one_that_starts_anywhere(
    trainer: Trainer, replica: Replica, tmp_path: Path
) -> None:
    full = trainer.publish(Version(0, 1), full=True)
    assert trainer.is_right(replica.switch(*full), Version(0, 1))
    for step in range(1, 201):
        trainer.update()
        version = Version(step, 1)
        manifest, digest = trainer.publish(version, complete=step % 20 == 0)
        assert manifest.delta is not None
        assert trainer.is_right(replica.switch(manifest, digest), version)
        if step % 33 == 0:
            newcomer = late(trainer, tmp_path)
            assert trainer.is_right(newcomer.switch(manifest, digest), version)
            newcomer.materializer.close()
        trainer.store.retain(2)
        trainer.store.verify(manifest)
    assert len(trainer.store.versions()) <= 21


def test_a_delta_is_a_fraction_of_the_complete_version(tmp_path: Path) -> None:
    trainer = Trainer(WeightStore(tmp_path / "weights"), share=0.005)
    (full, _), (delta, _) = trainer.steps(1)
    assert size_of(trainer.store, delta.version) < size_of(trainer.store, full.version) / 10


def test_a_version_in_which_nothing_or_everything_changes_is_right(trainer: Trainer, replica: Replica) -> None:
    replica.switch(*trainer.publish(Version(1, 1), full=True))
    manifest, digest = trainer.publish(Version(2, 1))
    assert manifest.delta
    assert trainer.is_right(replica.switch(manifest, digest), Version(2, 1))
    trainer.share = 1.0
    trainer.update()
    manifest, digest = trainer.publish(Version(3, 1))
    assert manifest.delta is None, "the deltas would not be smaller"
    assert is_complete(trainer.store, manifest)
    assert trainer.is_right(replica.switch(manifest, digest), Version(3, 1))
    trainer.share = 0.02
    trainer.update()
    assert trainer.is_right(replica.switch(*trainer.publish(Version(4, 1))), Version(4, 1))


def test_one_file_may_be_complete_while_another_has_a_delta(trainer: Trainer, replica: Replica) -> None:
    replica.switch(*trainer.publish(Version(1, 1), full=True))
    trainer.words["layer.weight"] = ~trainer.words["layer.weight"]
    mixed = trainer.publish(Version(2, 1))
    assert [*mixed[0].deltas] == ["model-00001-of-00002.safetensors"]
    assert not is_complete(trainer.store, mixed[0])
    assert trainer.is_right(replica.switch(*mixed), Version(2, 1))
    trainer.update()
    assert trainer.is_right(replica.switch(*trainer.publish(Version(3, 1))), Version(3, 1))
    assert closure(trainer.store, [Version(3, 1)]) == {Version(1, 1), Version(2, 1), Version(3, 1)}


def test_a_trainer_with_another_number_of_ranks_has_other_files(trainer: Trainer, replica: Replica) -> None:
    for version in trainer.steps(2):
        replica.switch(*version)
    again = Trainer(trainer.store)
    again.files = {f"model-{rank:05d}-of-00004.safetensors": {name: table[name]} for table in trainer.files.values()
                   for rank, name in enumerate(SHAPES, 1) if name in table}  # fmt: skip
    again.copy = PublishedCopy(again.files)
    for manifest, digest in again.steps(3, attempt=2):
        assert len(manifest.deltas) == (4 if manifest.version.step > 1 else 0)
        assert again.is_right(replica.switch(manifest, digest), manifest.version)


def test_a_copy_that_was_replaced_only_in_part_is_no_base(trainer: Trainer, replica: Replica) -> None:
    replica.switch(*trainer.publish(Version(1, 1), full=True))
    trainer.update()

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from [*trainer.tensors.items()][:2]
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError):
        trainer.copy.write(trainer.store.root, trainer.files, broken(), plan=Plan(Version(2, 1), Version(1, 1)))
    manifest, digest = trainer.publish(Version(2, 1))
    assert manifest.delta is None
    assert trainer.is_right(replica.switch(manifest, digest), Version(2, 1))


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_retention_keeps_everything_that_kept_and_leased_versions_are_made_out_of(trainer: Trainer) -> None:
    trainer.steps(3)
    trainer.update()
    trainer.publish(Version(5, 1), full=True)
    trainer.update()
    trainer.publish(Version(6, 1))
    trainer.store.lease("late", (Version(3, 1),))
    assert trainer.store.retain(1) == [Version(4, 1)]
    trainer.store.lease("late", ())
    assert trainer.store.retain(1) == [Version(1, 1), Version(2, 1), Version(3, 1)]
    assert trainer.store.versions() == [Version(5, 1), Version(6, 1)]


def test_retention_reads_no_manifest_of_complete_versions(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of a model with thousands of tensors is large."""
    for step in range(1, 4):
        trainer.publish(Version(step, 1), full=True)
    monkeypatch.setattr(trainer.store, "read", None)
    assert trainer.store.retain(1) == [Version(1, 1), Version(2, 1)]


def test_a_complete_version_needs_no_other_one(trainer: Trainer, tmp_path: Path) -> None:
    *_, (manifest, digest) = trainer.steps(2)
    trainer.complete(manifest)
    assert trainer.store.read(manifest.version) == (manifest, digest), "the manifest is the same"
    assert trainer.store.retain(1) == [Version(1, 1), Version(2, 1)]
    assert trainer.is_right(late(trainer, tmp_path).switch(manifest, digest), manifest.version)


def test_a_replica_keeps_two_versions_and_nothing_when_it_ends(
    trainer: Trainer, replica: Replica, tmp_path: Path
) -> None:
    for version in trainer.steps(5):
        replica.switch(*version)
    assert len([*(tmp_path / "local/tandem-g").iterdir()]) == 2
    replica.materializer.close()
    assert everything(tmp_path / "local") == []


def test_a_replica_that_starts_removes_what_a_killed_one_left(trainer: Trainer, replica: Replica) -> None:
    versions = trainer.steps(3)
    replica.switch(*versions[1])
    leftover = replica.files[0].parent.parent / ".partial"
    leftover.mkdir()
    (leftover / "torn").write_text("torn")
    replica.files[0].write_bytes(b"torn")
    replica.kill()
    again = Replica(trainer.store, replica.files[0].parents[2])
    assert trainer.is_right(again.switch(*versions[3]), Version(4, 1))
    assert len([*again.files[0].parent.parent.iterdir()]) == 1


# -- files that must not change --------------------------------------------------------------------------------------


def test_the_files_that_are_served_do_not_change_while_the_next_version_is_made(
    trainer: Trainer, replica: Replica
) -> None:
    versions = trainer.steps(4)
    for version in versions[:4]:
        replica.switch(*version)
    served, before = replica.files, replica.materializer
    before.make(*versions[4], replica.files)  # its load fails, and the served version is loaded again
    assert trainer.is_right(served, versions[3][0].version)
    trainer.update()
    after = trainer.publish(Version(6, 1))
    assert trainer.is_right(before.make(*after, replica.files), Version(6, 1))
    assert trainer.is_right(served, versions[3][0].version)


def test_a_file_that_is_still_mapped_is_never_overwritten(trainer: Trainer, replica: Replica) -> None:
    versions = trainer.steps(4)
    replica.switch(*versions[0])
    files = replica.switch(*versions[1])
    with files[0].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        content = mapped[:]
        for version in versions[2:]:
            replica.switch(*version)
        assert mapped[:] == content
    assert not files[0].exists()


def test_memory_of_an_old_version_is_used_again(trainer: Trainer, replica: Replica) -> None:
    versions = trainer.steps(4)
    inodes = []
    for version in versions[1:]:
        inodes.append(replica.switch(*version)[0].stat().st_ino)
    assert inodes[0] == inodes[2]
    assert inodes[1] == inodes[3]
    assert inodes[0] != inodes[1]


# -- what is damaged -------------------------------------------------------------------------------------------------


def test_flipped_bytes_anywhere_are_refused_and_a_complete_version_is_served_then(
    trainer: Trainer, replica: Replica, tmp_path: Path
) -> None:
    """The deltas, the base and the manifests of a chain, and what the replica has made before."""
    versions = trainer.steps(2)
    last = versions[-1]
    for version in versions[:2]:
        replica.switch(*version)
    chance, served = random.Random(0), replica.files
    targets = [path for path in everything(trainer.store.root / "versions") if path.name != MANIFEST_NAME]
    outcomes = set()
    for path in [*targets, *served]:
        original = path.read_bytes()
        for place in [0, 8, len(original) - 1, *(chance.randrange(len(original)) for _ in range(25))]:
            damaged = bytearray(original)
            damaged[place] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            for maker in (replica, late(trainer, tmp_path)):
                try:
                    files = maker.materializer.make(*last, served if maker is replica else ())
                except WeightsRefused:
                    outcomes.add((maker is replica, "refused"))
                else:
                    assert trainer.is_right(files, last[0].version)
                    outcomes.add((maker is replica, "right"))
                if maker is not replica:
                    maker.materializer.close()
        path.write_bytes(original)
    assert outcomes == {(True, "refused"), (True, "right"), (False, "refused"), (False, "right")}
    for path in targets:
        path.write_bytes(b"damaged")
    trainer.complete(last[0])
    assert trainer.is_right(late(trainer, tmp_path).switch(*last), last[0].version)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_base_is_reported_and_a_replica_that_has_it_does_not_need_it(
    trainer: Trainer, replica: Replica, tmp_path: Path, lost: int
) -> None:
    versions = trainer.steps(3)
    for version in versions[:3]:
        replica.switch(*version)
    shutil.rmtree(trainer.store.directory(Version(lost, 1)))
    assert trainer.is_right(replica.switch(*versions[3]), Version(4, 1))
    with pytest.raises(WeightsRefused, match=rf"version 4\.1 .* version {lost}\.1 is missing.*again in full"):
        late(trainer, tmp_path).switch(*versions[3])


def test_a_base_of_another_run_is_not_used(trainer: Trainer, replica: Replica, tmp_path: Path) -> None:
    *_, last = trainer.steps(1)
    other = Trainer(WeightStore(tmp_path / "other/weights"), share=0.5)
    other.update()
    other.publish(Version(1, 1), full=True)
    shutil.rmtree(trainer.store.directory(Version(1, 1)))
    shutil.copytree(other.store.directory(Version(1, 1)), trainer.store.directory(Version(1, 1)))
    with pytest.raises(WeightsRefused, match=r"version 1\.1 of this run is missing"):
        replica.switch(*last)


def test_two_processes_with_the_same_name_never_write_the_same_files(
    trainer: Trainer, replica: Replica, tmp_path: Path
) -> None:
    versions = trainer.steps(2)
    replica.switch(*versions[1])
    second = Replica(trainer.store, tmp_path / "local")
    with pytest.raises(WeightsRefused, match=r"another process uses the folder.*generator\.generator_id"):
        second.switch(*versions[2])
    assert trainer.is_right(replica.files, Version(2, 1))
    replica.materializer.close()
    assert trainer.is_right(second.switch(*versions[2]), Version(3, 1))


def test_a_folder_of_another_user_is_not_used(
    trainer: Trainer, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, last = trainer.steps(1)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(WeightsRefused, match="another user owns the folder"):
        replica.switch(*last)


def test_without_numpy_deltas_are_refused_and_complete_files_are_served(
    trainer: Trainer, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the image of the mock."""
    first, last = trainer.steps(1)
    monkeypatch.delitem(sys.modules, "tandem_protocol.delta", raising=False)
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert trainer.is_right(replica.switch(*first), Version(1, 1))
    with pytest.raises(WeightsRefused, match="numpy"):
        replica.switch(*last)
    trainer.complete(last[0])
    assert trainer.is_right(replica.switch(*last), Version(2, 1))


def test_a_folder_that_is_a_link_is_not_used(trainer: Trainer, tmp_path: Path) -> None:
    *_, last = trainer.steps(1)
    (tmp_path / "local").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "local/tandem-g").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsRefused):
        Replica(trainer.store, tmp_path / "local").switch(*last)
    assert [*(tmp_path / "elsewhere").iterdir()] == []
