"""The log and the screens write a duration in the same words, with its two largest units."""

from __future__ import annotations

import pytest

from tandem_protocol.durations import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (187, "3 min 7 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h"),
        (12000, "3 h 20 min"), (360000, "100 h"),
    ],
)  # fmt: skip
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
