"""The copy of the last version takes memory only while deltas are made."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer import deltas
from tandem_trainer.deltas import MIN_BYTES, PROTOCOL, TRIED, Deltas
from tandem_trainer.publication import Part
from tandem_trainer.published_copy import Files, PublishedCopy

PART = Part("full", {"model.safetensors": {"w": torch.empty(4, dtype=torch.bfloat16)}}, iter(()), MIN_BYTES)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[PublishedCopy]:
    """The copies that are in memory."""
    found: weakref.WeakSet[PublishedCopy] = weakref.WeakSet()

    def make(files: Files) -> PublishedCopy:
        found.add(copy := PublishedCopy(files))
        return copy

    monkeypatch.setattr(deltas, "PublishedCopy", make)
    return found


def test_a_copy_that_is_not_used_any_more_is_dropped(tmp_path: Path, copies: weakref.WeakSet[PublishedCopy]) -> None:
    client: Any = SimpleNamespace(protocols=SimpleNamespace(oldest=PROTOCOL))
    decided = Deltas("always", torch.bfloat16, WeightStore(tmp_path), Accelerator(cpu=True), client)
    assert decided.plan(Version(1, 1), PART)
    assert len(copies) == 1
    client.protocols.oldest = PROTOCOL - 1  # an older generator has joined
    assert decided.plan(Version(2, 1), PART) is None
    assert not copies


def test_auto_needs_memory_for_two_versions_before_it_makes_a_copy_and_none_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: weakref.WeakSet[PublishedCopy],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    client: Any = SimpleNamespace(protocols=SimpleNamespace(oldest=PROTOCOL))
    decided = Deltas("auto", torch.bfloat16, WeightStore(tmp_path), Accelerator(cpu=True), client)
    manifest: Any = SimpleNamespace(version=Version(1, 1), size_bytes=MIN_BYTES, deltas={}, delta=None)
    monkeypatch.setattr(deltas, "is_in_memory", lambda _: False)
    monkeypatch.setattr(deltas, "is_complete", lambda *_: True)
    for step in range(TRIED):
        assert decided.plan(Version(step, 1), PART) is None
        decided.committed(manifest, "digest", write_s=10)
    small, enough = 2 * MIN_BYTES - 1, 2 * MIN_BYTES
    for available, is_planned in ((small, False), (small, False), (enough, True), (0, True)):
        monkeypatch.setattr(deltas, "available_bytes", lambda available=available: available)
        assert bool(decided.plan(Version(9, 1), PART)) == bool(copies) == is_planned
    stays, begins = caplog.messages
    assert "written at 7 MB/s. Versions stay complete" in stays
    assert "0.1 GB of free memory" in stays
    assert "only what changes is published" in begins
