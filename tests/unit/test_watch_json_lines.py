"""Lines of a large file are found by bisecting it, whatever else is in it."""

from __future__ import annotations

import io
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem_cli.watch import json_lines
from tandem_cli.watch.json_lines import Ends, after_newline_before, ends, first_of_step, lines, parse

STEPS = st.lists(st.integers(0, 12), max_size=40).map(sorted)
DAMAGED = (b"", b"\0\0\0", b'{"step": 1', b"[1]", b'{"ste{"step": 3}', b"1" * 5000, b'{"step": "x"}', b"[" * 100_000)


class Counted(io.BytesIO):
    """Counts the bytes that are read."""

    bytes_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.bytes_read += len(data)
        return data

    def readline(self, size: int | None = -1) -> bytes:
        data = super().readline(size)
        self.bytes_read += len(data)
        return data


def line(step: int, key_first: bool = True, size: int = 10) -> bytes:
    record: dict[str, Any] = {"step": step} if key_first else {"a": 1, "step": step}
    return json.dumps(record | {"text": "x" * size}).encode()


@given(
    steps=STEPS,
    damaged=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(DAMAGED)), max_size=4),
    torn=st.sampled_from((b"", b'{"step": 99')),
    key_first=st.booleans(),
    size=st.sampled_from((0, 10, 200_000)),
)
def test_the_first_line_of_a_step_is_found(
    steps: list[int], damaged: list[tuple[int, bytes]], torn: bytes, key_first: bool, size: int
) -> None:
    written = [line(step, key_first, size if i % 7 == 3 else 10) for i, step in enumerate(steps)]
    for place, data in damaged:
        written.insert(place, data)
    file = io.BytesIO(b"".join(data + b"\n" for data in written) + torn)
    end = ends(file, Ends()).complete
    assert end == sum(len(data) + 1 for data in written)
    undamaged = [(one.start, one.record["step"]) for one in lines(file, 0, end) if one.record and is_step(one.record)]
    assert [step for _, step in undamaged] == steps
    for step in range(14):
        assert first_of_step(file, step, end) == next((start for start, found in undamaged if found >= step), end)


def is_step(record: dict[str, Any] | None) -> bool:
    return record is not None and isinstance(record.get("step"), int)


@given(sizes=st.lists(st.sampled_from((1, 9, 70_000, 140_000)), min_size=1, max_size=6))
def test_lines_are_found_from_the_front_and_from_the_back(sizes: list[int]) -> None:
    written = [bytes([65 + n]) * size + b"\n" for n, size in enumerate(sizes)]
    file = io.BytesIO(b"".join(written))
    end = ends(file, Ends()).complete
    assert [one.data for one in lines(file, 0, end)] == written
    backwards, start = [], end
    while start:
        before = after_newline_before(file, start - 1)
        backwards.append(file.getvalue()[before:start])
        start = before
    assert backwards == written[::-1]


def test_a_line_that_is_too_long_is_skipped_and_not_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(json_lines, "LINE_BYTES", 1000)
    file = Counted(line(1) + b"\n" + line(2, size=300_000) + b"\n" + line(3) + b"\n")
    found = list(lines(file, 0, ends(file, Ends()).complete))
    assert [one.record and one.record["step"] for one in found] == [1, None, 3]
    assert max(len(one.data or b"") for one in found) < 1000


def test_a_step_of_a_large_file_is_found_without_reading_the_file() -> None:
    block = b"".join(line(0, size=2000) + b"\n" for _ in range(50))
    data = b"".join(block.replace(b'"step": 0', b'"step": %d' % step) for step in range(2000))
    file = Counted(data)
    assert len(data) > 200_000_000
    found = first_of_step(file, 1234, ends(file, Ends()).complete)
    assert data[found:].startswith(b'{"step": 1234,')
    assert data[found - 2025 :].startswith(b'{"step": 1233,') or data[:found].rpartition(b'"step": ')[2].startswith(
        b"1233"
    )
    assert file.bytes_read < 4_000_000


def test_a_huge_line_is_read_only_a_few_times_while_a_step_is_looked_for() -> None:
    huge = line(2, size=8_000_000) + b"\n"
    file = Counted(line(1) + b"\n" + huge + line(3) + b"\n")
    end = ends(file, Ends()).complete
    for step, expected in ((1, 0), (2, len(line(1)) + 1), (3, end - len(line(3)) - 1)):
        file.bytes_read = 0
        assert first_of_step(file, step, end) == expected
        assert file.bytes_read < 3 * len(huge)


@given(number=st.sampled_from(("NaN", "Infinity", "-Infinity", "1e999", "-1e999")))
def test_numbers_that_json_cannot_express_become_null(number: str) -> None:
    assert parse(b'{"a": [%s, 1.5]}' % number.encode()) == {"a": [None, 1.5]}
