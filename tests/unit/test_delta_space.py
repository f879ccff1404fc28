"""Deltas are made only where there is space for the complete files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.delta_versions import Replica, Trainer, everything
from tandem_generator import materializer
from tandem_protocol.errors import WeightsRefused
from tandem_protocol.store import WeightStore


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(WeightStore(tmp_path / "weights"))


def test_without_space_for_the_files_the_version_is_refused(trainer: Trainer, small_volume: Path) -> None:
    *_, last = trainer.steps(1)
    (small_volume / "ballast").write_bytes(b"x" * 60_000)
    with pytest.raises(WeightsRefused, match=r"got space for .* MB, expected .* MB.*generator\.materialize_dir"):
        Replica(trainer.store, small_volume).switch(*last)


def test_space_for_two_versions_is_asked_for_before_anything_is_written(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = trainer.steps(3)
    size, replica = versions[0][0].size_bytes, Replica(trainer.store, tmp_path / "local")

    def volume(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    volume(2 * size - 1)
    with pytest.raises(WeightsRefused, match="got space for"):
        replica.switch(*versions[1])
    assert not everything(tmp_path / "local")
    for left, version in zip((2 * size, size, 0), versions[1:], strict=True):  # what is there is overwritten
        volume(left)
        assert trainer.is_right(replica.switch(*version), version[0].version)


def test_a_folder_in_memory_has_no_more_space_than_the_memory_that_is_left(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = trainer.steps(1)
    monkeypatch.setattr(materializer, "available_bytes", lambda: 2 * versions[0][0].size_bytes - 1)
    monkeypatch.setattr(materializer, "is_in_memory", lambda _: True)
    with pytest.raises(WeightsRefused, match="got space for"):
        Replica(trainer.store, tmp_path / "local").switch(*versions[1])
    monkeypatch.setattr(materializer, "is_in_memory", lambda _: False)
    assert trainer.is_right(Replica(trainer.store, tmp_path / "disk").switch(*versions[1]), versions[1][0].version)
