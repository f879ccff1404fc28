"""Every error crosses the wire, and the client raises the same exception."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tandem_protocol import errors
from tandem_protocol.errors import ErrorBody, TandemError, from_body


def all_errors(root: type[TandemError] = TandemError) -> Iterator[type[TandemError]]:
    yield root
    for sub in root.__subclasses__():
        yield from all_errors(sub)


@pytest.mark.parametrize("cls", all_errors())
def test_an_error_survives_the_trip_over_the_wire(cls: type[TandemError]) -> None:
    sent = cls("got 3, expected 4. Add one.")
    received = from_body(ErrorBody.model_validate_json(sent.body.model_dump_json()))
    assert type(received) is cls
    assert received.body == sent.body


def test_no_two_errors_share_a_code() -> None:
    codes = [cls.code for cls in all_errors()]
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("cls", all_errors())
def test_only_errors_that_time_can_fix_are_retryable(cls: type[TandemError]) -> None:
    assert cls.retryable == (cls.status in (503, 504) or cls in (errors.StalePolicy, errors.SwitchInProgress))


def test_an_unknown_code_from_a_newer_release_keeps_its_message() -> None:
    received = from_body(ErrorBody(code="from_the_future", message="what to do", retryable=False))
    assert type(received) is TandemError
    assert str(received) == "what to do"
