"""A delta makes exactly the new file out of the old one, or is refused: whatever changed, and whatever is damaged."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tandem_protocol import delta
from tandem_protocol.manifest import digest_bytes

SIZES = (0, 1, 2, 3, 1001, 2000, 4095, 4096, 4097, 12301)
SPECIAL = [0x0000, 0x8000, 0x7FC0, 0x7FC1, 0xFFC0, 0x7F80, 0x0001]
"""Words of bfloat16: 0.0, -0.0, two payloads of NaN, -NaN, infinity, the smallest number."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "BLOCK_WORDS", 1024)


def changed(old: np.ndarray, share: float, chance: np.random.Generator) -> np.ndarray:
    new = old.copy()
    mask = chance.random(len(new)) < share
    new[mask] ^= chance.integers(1, 256, int(mask.sum()), dtype=np.uint8)
    return new


def made(old: np.ndarray, new: np.ndarray) -> delta.Delta:
    return delta.decode(encoded(old, new))


def encoded(old: np.ndarray, new: np.ndarray) -> bytes:
    return delta.encode(delta.changed_words(old, new), new)


def applied(base: np.ndarray, chain: list[delta.Delta], folder: Path) -> bytes:
    (folder / "base").write_bytes(base.tobytes())
    digest = delta.apply(folder / "base", chain, folder / "result")
    result = (folder / "result").read_bytes()
    assert digest == digest_bytes(result)
    assert (folder / "base").read_bytes() == base.tobytes()
    return result


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_a_chain_gives_every_byte_of_every_version(tmp_path: Path, size: int, share: float) -> None:
    chance = np.random.default_rng(size)
    versions = [chance.integers(0, 256, size, dtype=np.uint8)]
    for _ in range(3):
        versions.append(changed(versions[-1], share, chance))
    chain = [made(old, new) for old, new in pairwise(versions)]
    for length in range(4):
        assert applied(versions[0], chain[:length], tmp_path) == versions[length].tobytes()


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 1023, 1024, 1025, 2500])
def test_gaps_of_any_length_are_exact(tmp_path: Path, gap: int) -> None:
    old = np.zeros(2 * 6000, np.uint8)
    new = old.copy()
    new.view("<u2")[[3, 4 + gap, 5 + 2 * gap]] = 7
    assert applied(old, [made(old, new)], tmp_path) == new.tobytes()


def test_words_are_compared_as_bits_not_as_numbers(tmp_path: Path) -> None:
    for before in SPECIAL:
        for after in SPECIAL:
            old, new = (np.full(5, word, "<u2").view(np.uint8) for word in (before, after))
            assert applied(old, [made(old, new)], tmp_path) == new.tobytes()


def test_a_longer_file_that_is_overwritten_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "result").write_bytes(b"x" * 9000)
    old, new = np.zeros(4097, np.uint8), np.ones(4097, np.uint8)
    assert applied(old, [made(old, new)], tmp_path) == new.tobytes()


def test_one_changed_word_in_a_hundred_takes_a_sixtieth_of_the_file() -> None:
    chance = np.random.default_rng(0)
    old = chance.integers(0, 256, 200_000, dtype=np.uint8)
    new = old.copy()
    new.view("<u2")[chance.choice(100_000, 1000, replace=False)] ^= 1
    assert len(encoded(old, new)) < 200_000 / 60 + 16 * 100


def test_a_delta_for_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    old, new = np.zeros(4096, np.uint8), np.ones(4096, np.uint8)
    with pytest.raises(delta.BrokenDelta, match="4096 bytes, expected 4094"):
        applied(old[:4094], [made(old, new)], tmp_path)


def test_a_delta_that_is_cut_short_anywhere_is_refused() -> None:
    old = np.zeros(4097, np.uint8)
    data = encoded(old, changed(old, 0.01, np.random.default_rng(0)))
    for length in range(len(data)):
        with pytest.raises(delta.BrokenDelta):
            delta.decode(data[:length])
    with pytest.raises(delta.BrokenDelta):
        delta.decode(data + b"\0")


def test_a_flipped_byte_anywhere_is_refused_or_shows_in_the_digest(tmp_path: Path) -> None:
    chance, draw = np.random.default_rng(0), random.Random(0)
    old = chance.integers(0, 256, 4097, dtype=np.uint8)
    new = changed(old, 0.01, chance)
    data, expected = encoded(old, new), digest_bytes(new.tobytes())
    (tmp_path / "base").write_bytes(old.tobytes())
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= draw.randrange(1, 256)
        try:
            digest = delta.apply(tmp_path / "base", [delta.decode(bytes(damaged))], tmp_path / "result")
        except delta.BrokenDelta:
            continue
        assert digest != expected or (tmp_path / "result").read_bytes() == new.tobytes()
