"""Parse and compare lists of devices: CPU cores and GPUs.

A device is an index (`0`), a UUID (`GPU-<uuid>`, `MIG-<uuid>`) or a CDI name (`nvidia.com/gpu=0`). Lists may contain
ranges: `0-3,8`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .config import ConfigError

CDI_KIND = "nvidia.com/gpu="
"""Prefix of the CDI names of NVIDIA GPUs. An index or a UUID follows."""

_INDEXES = re.compile(r"(\d+)(?:-(\d+))?")
_NAME = re.compile(r"(GPU|MIG)-[\w/-]+|[\w.-]+/[\w.-]+=(?!all$)[\w.:-]+")
"""`nvidia.com/gpu=all` does not match: it overlaps every other set."""


def parse_devices(text: str) -> tuple[str, ...]:
    """Parse a list of devices.

    `0-2,5` gives `("0", "1", "2", "5")`. Names are kept as they are written. An empty text gives an empty tuple.

    Args:
        text: The list, separated by commas.

    Returns:
        The devices in the order given. A device that is listed twice is there twice (`repeated_devices`).

    Raises:
        ConfigError: A part of `text` is not a device.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    return tuple(device for part in parts for device in _expand(part, text))


def _expand(part: str, text: str) -> Sequence[str]:
    if _NAME.fullmatch(part):
        return [part]
    if indexes := _INDEXES.fullmatch(part):
        first = int(indexes[1])
        last = int(indexes[2] or indexes[1])
        if first <= last:
            return [str(index) for index in range(first, last + 1)]
    raise ConfigError(
        f"got the devices {text!r}, where {part!r} is not a device, expected a list of indexes, rising ranges, UUIDs "
        f"or CDI names: 0-3,8 or GPU-8932f937-d72c-4106-c12f-20bd9faed9f6 or {CDI_KIND}0"
    )


def identity(device: str, uuids: Mapping[str, str] | None = None) -> str:
    """Return one name for a device, however it is written.

    Args:
        device: An index, a UUID or a CDI name.
        uuids: Index → UUID. Without it, an index and a UUID never count as the same device.
    """
    name = device.removeprefix(CDI_KIND)
    return (uuids or {}).get(name, name).lower()


def repeated_devices(devices: Sequence[str], uuids: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the devices that the list has named before, as it writes them.

    Args:
        devices: The list.
        uuids: Index → UUID, to recognize a device that is written differently.
    """
    names = [identity(device, uuids) for device in devices]
    return tuple(device for place, device in enumerate(devices) if names[place] in names[:place])


def shared_devices(
    ours: Sequence[str], theirs: Sequence[str], uuids: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Return the devices that are in both lists, as `ours` writes them.

    Args:
        ours: The first list.
        theirs: The second list.
        uuids: Index → UUID, to recognize a device that the two lists write differently.
    """
    taken = {identity(device, uuids) for device in theirs}
    return tuple(device for device in ours if identity(device, uuids) in taken)


def shares_all(generator: Sequence[str], trainer: Sequence[str]) -> bool:
    """Whether the services share all their CPUs: `0-3` and `0-3`, but not `0-3` and `3-7`, or `0` and `0`.

    That is faster if one of them waits while the other works, as with `max_lag: 0`.
    """
    return len(generator) > 1 and set(generator) == set(trainer)


def check_disjoint(
    generator: Sequence[str], trainer: Sequence[str], *, kind: str, fix: str, uuids: Mapping[str, str] | None = None
) -> None:
    """Refuse two sets of devices that overlap.

    Two services on one device would take turns on it, which is slower than one service, or run out of its memory.

    Args:
        generator: Devices of the generator.
        trainer: Devices of the trainer.
        kind: `CPUs` or `GPUs`, for the message.
        fix: What the user should do, for the message.
        uuids: Index → UUID, to recognize a device that the two sets write differently.

    Raises:
        ConfigError: The sets overlap.
    """
    if shared := shared_devices(generator, trainer, uuids):
        raise ConfigError(
            f"got the {kind} {', '.join(generator)} for the generator and {', '.join(trainer)} for the trainer, which "
            f"share {', '.join(shared)}, expected disjoint sets: {fix}"
        )
