"""The delta of a file is right, whatever the sizes of its tensors and the order in which they come."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tandem_protocol.delta import apply, decode, encode
from tandem_protocol.manifest import DELTA_SUFFIX
from tandem_protocol.version import Version
from tandem_trainer.published_copy import Plan, PublishedCopy, _replaced, _sorted

NAME = "model.safetensors"
OLD, NEW = Version(1, 1), Version(2, 1)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    changed=st.sets(st.integers(0, 239), max_size=30),
    order=st.permutations(range(6)),
)
@example(sizes=[3, 9], changed={2, 3, 5}, order=[1, 0, 2, 3, 4, 5])  # both tensors change the word that they share
def test_a_delta_makes_the_new_file_out_of_the_old_one(sizes: list[int], changed: set[int], order: list[int]) -> None:
    # Tensors of single bytes begin and end in the middle of a word.
    tensors = {f"t{index}": torch.zeros(size, dtype=torch.uint8) for index, size in enumerate(sizes)}
    names = [f"t{index}" for index in order if f"t{index}" in tensors]
    copy = PublishedCopy({NAME: tensors})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy.write(folder, {NAME: tensors}, [(one, tensors[one]) for one in names], plan=Plan(OLD))
        base = (folder / NAME).rename(folder / "base")
        every_byte = [(tensor, at) for tensor in tensors.values() for at in range(len(tensor))]
        for index in changed & {*range(len(every_byte))}:
            tensor, at = every_byte[index]
            tensor[at] = 1
        digests = copy.write(folder, {NAME: tensors}, [(one, tensors[one]) for one in names], plan=Plan(NEW, OLD, True))
        if (folder / (NAME + DELTA_SUFFIX)).exists():
            delta = decode((folder / (NAME + DELTA_SUFFIX)).read_bytes())
            assert apply(base, [delta], folder / "made") == digests[NAME]
            assert (folder / "made").read_bytes() == (folder / NAME).read_bytes()


def test_a_file_with_many_changed_words_is_written_in_full(tmp_path: Path) -> None:
    for share in (0.3, 0.35):
        tensors = {"t": torch.zeros(100_000, dtype=torch.int16)}
        copy = PublishedCopy({NAME: tensors})
        copy.write(tmp_path, {NAME: tensors}, tensors.items(), plan=Plan(OLD))
        tensors["t"][: int(share * 100_000)] = 1
        digests = copy.write(tmp_path, {NAME: tensors}, tensors.items(), plan=Plan(NEW, OLD))
        assert (NAME + DELTA_SUFFIX in digests) == (share == 0.3)


def test_a_file_beyond_8_gib_in_which_nothing_changes_has_an_empty_delta() -> None:
    file = np.zeros((8 << 30) + 2, np.uint8)  # the kernel gives no memory for what is not used
    nothing = _replaced(file, len(file) - 2, np.zeros(2, np.uint8), compare=True)
    assert len(decode(encode(_sorted([nothing]), file)).words) == 0
    last = _replaced(file, len(file) - 2, np.ones(2, np.uint8), compare=True)
    assert decode(encode(_sorted([nothing, last]), file)).block(4096)[0].tolist() == [0]
