"""Sets of devices: how they are parsed, and which devices two services share."""

from __future__ import annotations

import pytest

from tandem_protocol.config import ConfigError
from tandem_protocol.device_sets import (
    check_disjoint,
    identity,
    parse_devices,
    repeated_devices,
    shared_devices,
    shares_all,
)

UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("0-3", ("0", "1", "2", "3")),
        ("5, 0,2-2", ("5", "0", "2")),
        ("0-1,1,0", ("0", "1", "1", "0")),
        (f"{UUID},MIG-{UUID}/7/0", (UUID, f"MIG-{UUID}/7/0")),
        ("nvidia.com/gpu=0,nvidia.com/gpu=1:2", ("nvidia.com/gpu=0", "nvidia.com/gpu=1:2")),
        ("", ()),
    ],
)
def test_devices_keep_their_order_and_their_duplicates(text: str, devices: tuple[str, ...]) -> None:
    assert parse_devices(text) == devices


@pytest.mark.parametrize("part", ["3-0", "", "all", "nvidia.com/gpu=all", "-1", "0-", "a", "GPU-", "0 1"])
def test_an_invalid_device_is_refused_by_name(part: str) -> None:
    with pytest.raises(ConfigError, match=f"where '{part}' is not a device, expected a list"):
        parse_devices(f"0,{part}")


def test_different_names_of_one_device_are_recognized() -> None:
    uuids = {"3": UUID}
    assert len({identity(name, uuids) for name in ("3", "nvidia.com/gpu=3", UUID, f"nvidia.com/gpu={UUID}")}) == 1
    assert shared_devices(("2", "3"), (UUID.upper(), "4"), uuids) == ("3",)
    assert shared_devices(("0", "1"), ("nvidia.com/gpu=1",)) == ("1",)
    assert shared_devices(("nvidia.com/gpu=1",), ("amd.com/gpu=1",)) == ()
    assert shared_devices((), ("1",)) == ()


def test_devices_that_a_list_names_twice_are_found_however_they_are_written() -> None:
    uuids = {"3": UUID}
    assert repeated_devices(("0", "1", "0", "0")) == ("0", "0")
    assert repeated_devices(("3", UUID.upper(), "nvidia.com/gpu=3"), uuids) == (UUID.upper(), "nvidia.com/gpu=3")
    assert repeated_devices(("0", "1", UUID), uuids) == ()


def test_overlapping_sets_are_refused_and_both_are_listed() -> None:
    check_disjoint(("0", "1"), ("2",), kind="GPUs", fix="-")
    message = "got the GPUs 0, 1 for the generator and 1, 2 for the trainer, which share 1, expected .*: do this"
    with pytest.raises(ConfigError, match=message):
        check_disjoint(("0", "1"), ("1", "2"), kind="GPUs", fix="do this")


@pytest.mark.parametrize(
    ("generator", "trainer", "expected"),
    [("0-3", "0-3", True), ("0-3", "3,2,1,0", True), ("0-3", "3-7", False), ("0", "0", False), ("", "", False)],
)
def test_only_equal_sets_of_several_cpus_are_shared_on_purpose(generator: str, trainer: str, expected: bool) -> None:
    assert shares_all(parse_devices(generator), parse_devices(trainer)) is expected
