"""The tensors of a version's files come in order, and the next file is read while those of one are copied."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tandem_generator.shard_files import tensors_of

TIMEOUT_S = 60.0


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_file({f"{number}.{name}": torch.full((5,), number + 0.5) for name in "ab"}, path)
    return [str(path) for path in paths]


def test_all_tensors_of_all_files_come_in_order(shards: list[str]) -> None:
    found = [(name, tensor.tolist()) for name, tensor in tensors_of(shards)]
    assert found == [(f"{number}.{name}", [number + 0.5] * 5) for number in range(3) for name in "ab"]
    assert list(tensors_of([])) == []


def test_the_next_file_is_read_while_the_tensors_of_one_are_copied(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advise = os.posix_fadvise
    read = {shard: threading.Event() for shard in shards}

    def noted(descriptor: int, *arguments: Any) -> None:
        advise(descriptor, *arguments)
        read[str(Path(f"/proc/self/fd/{descriptor}").readlink())].set()

    monkeypatch.setattr(os, "posix_fadvise", noted)
    tensors = tensors_of(shards)
    assert next(tensors)[0] == "0.a"
    assert read[shards[1]].wait(TIMEOUT_S)
    assert not read[shards[2]].is_set()
    assert [name for name, _ in tensors] == ["0.b", "1.a", "1.b", "2.a", "2.b"]


def test_a_file_that_is_missing_is_an_error_when_its_turn_comes(shards: list[str]) -> None:
    Path(shards[1]).unlink()
    tensors = tensors_of(shards)
    assert [next(tensors)[0], next(tensors)[0]] == ["0.a", "0.b"]
    with pytest.raises(FileNotFoundError, match=r"1\.safetensors"):
        next(tensors)
