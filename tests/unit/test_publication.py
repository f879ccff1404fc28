"""A part of a version that cannot be written, or that nobody waits for, is reported at once."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tandem_protocol.errors import StoreError
from tandem_protocol.version import Version
from tandem_trainer import publication
from tandem_trainer.publication import Part, Publication

FILE = "model-00002-of-00002.safetensors"


@pytest.fixture
def published(tmp_path: Path) -> Publication:
    part = Part("full", {FILE: {"w": torch.empty(4)}}, iter(()), 16)
    return Publication(Version(1, 1), part, lambda: nullcontext(tmp_path))


def test_a_process_that_finds_the_volume_full_makes_room_for_saying_so(
    published: Publication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(folder: Path, *_arguments: object) -> dict[str, str]:
        (folder / FILE).write_bytes(b"half")
        raise StoreError("full")

    monkeypatch.setattr(publication, "write_files", full)
    with pytest.raises(StoreError, match="full"):
        published.write_behind([], rank=1, ranks=2, timeout_s=60)
    (announced,) = tmp_path.iterdir()
    assert json.loads(announced.read_text()) is None


def test_a_version_that_is_given_up_waits_for_no_other_process(published: Publication, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(publication, "write_files", lambda *_arguments: {})
    raised: list[BaseException] = []

    def write() -> None:
        try:
            published.write_behind([], rank=0, ranks=2, timeout_s=600)
        except StoreError as error:
            raised.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    published.is_given_up.set()
    thread.join(60)
    assert not thread.is_alive()
    assert "given up" in str(raised[0])
