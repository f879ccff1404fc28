"""Versions are ordered by attempt, then by step, and survive the trip over the wire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from tandem_protocol.version import BASE, Version

versions = st.builds(Version, st.integers(0, 10**7), st.integers(0, 10**3))


class Holder(BaseModel):
    version: Version


@given(versions, versions)
def test_versions_are_ordered_by_attempt_then_by_step(a: Version, b: Version) -> None:
    assert (a < b) == ((a.attempt, a.step) < (b.attempt, b.step))
    assert (a <= b) == (a < b or a == b)
    assert (a > b) == (b < a)
    assert (a >= b) == (b <= a)


def test_a_later_attempt_at_a_smaller_step_is_newer() -> None:
    assert max(Version(42, 1), Version(40, 2)) == Version(40, 2)
    assert sorted([Version(1, 2), Version(9, 1), Version(10, 1)]) == [Version(9, 1), Version(10, 1), Version(1, 2)]


@given(versions)
def test_base_weights_are_the_oldest_version(version: Version) -> None:
    assert version == BASE or version > BASE


@given(versions)
def test_a_version_survives_text_and_json(version: Version) -> None:
    assert Version.parse(str(version)) == version
    assert Holder.model_validate_json(Holder(version=version).model_dump_json()).version == version


def test_a_version_is_a_string_in_json_and_its_schema() -> None:
    assert Holder(version=Version(42, 2)).model_dump_json() == '{"version":"42.2"}'
    assert Holder.model_json_schema()["properties"]["version"]["type"] == "string"


@pytest.mark.parametrize("text", ["", "42", "42.", ".1", "-1.0", "42.1.0", "42.1\n", " 42.1", "a.b", "٤٢.١"])
def test_text_that_is_not_step_dot_attempt_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected step\.attempt"):
        Version.parse(text)


@pytest.mark.parametrize("value", [42, 42.1, None, [42, 1], "latest"])
def test_a_message_refuses_an_invalid_version(value: object) -> None:
    with pytest.raises(ValidationError):
        Holder.model_validate({"version": value})
