"""Sets of devices as a person writes them, and which of them two services share.

CPU sets and GPUs alike: `0-3,8`, `GPU-<uuid>`, `MIG-<uuid>`, CDI names such as `nvidia.com/gpu=0`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .config import ConfigError

CDI_KIND = "nvidia.com/gpu="
"""What the CDI names of NVIDIA's GPUs begin with; an index or a UUID follows."""

_INDEXES = re.compile(r"(\d+)(?:-(\d+))?")
_NAME = re.compile(r"(GPU|MIG)-[\w/-]+|[\w.-]+/[\w.-]+=(?!all$)[\w.:-]+")
"""Not `=all`, which shares a device with every other set."""


def parse_devices(text: str) -> tuple[str, ...]:
    """`0-2,5` → `("0", "1", "2", "5")`, in the order given and each once; names stay as they are, nothing is ().

    Raises:
        ConfigError: `text` is no list of devices.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    return tuple(dict.fromkeys(device for part in parts for device in _expand(part, text)))


def _expand(part: str, text: str) -> Sequence[str]:
    if _NAME.fullmatch(part):
        return [part]
    if indexes := _INDEXES.fullmatch(part):
        first, last = int(indexes[1]), int(indexes[2] or indexes[1])
        if first <= last:
            return [str(index) for index in range(first, last + 1)]
    raise ConfigError(
        f"got the devices {text!r}, where {part!r} is none, expected a list of indexes, rising ranges, UUIDs or CDI "
        f"names: 0-3,8 or GPU-8932f937-d72c-4106-c12f-20bd9faed9f6 or {CDI_KIND}0"
    )


def identity(device: str, uuids: Mapping[str, str] | None = None) -> str:
    """One name for a device however it was written; `uuids` tells which index is which UUID, where that is known."""
    name = device.removeprefix(CDI_KIND)
    return (uuids or {}).get(name, name).lower()


def shared_devices(
    ours: Sequence[str], theirs: Sequence[str], uuids: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Those of `ours` that are in `theirs` as well, as `ours` writes them."""
    taken = {identity(device, uuids) for device in theirs}
    return tuple(device for device in ours if identity(device, uuids) in taken)


def check_disjoint(
    generator: Sequence[str], trainer: Sequence[str], *, kind: str, fix: str, uuids: Mapping[str, str] | None = None
) -> None:
    """Refuse sets that overlap: services that take turns on a device are slower than one, or out of its memory.

    Args:
        kind: `CPUs` or `GPUs`.
        fix: what to do about it.

    Raises:
        ConfigError: they do.
    """
    if shared := shared_devices(generator, trainer, uuids):
        raise ConfigError(
            f"got the {kind} {', '.join(generator)} for the generator and {', '.join(trainer)} for the trainer, which "
            f"share {', '.join(shared)}, expected disjoint sets: {fix}"
        )
