"""Reads nvidia-smi. It is called once, since each call takes seconds on a host with many GPUs."""

from __future__ import annotations

from xml.etree import ElementTree

from ..gpu_inventory import DevicesUnknown, nvidia_smi
from .facts import Gpu, Nvidia, Process
from .unknown import Unknown

INSTALL = "install NVIDIA's driver; `nvidia-smi` must list the GPUs"


def read_nvidia() -> Nvidia | Unknown:
    """Return the driver and the GPUs of this host."""
    try:
        text = nvidia_smi("-q", "-x")
    except DevicesUnknown as error:
        return Unknown(str(error), INSTALL)
    try:
        return parse_nvidia(text)
    except (ElementTree.ParseError, ValueError) as error:
        return Unknown(f"the output of `nvidia-smi -q -x` cannot be parsed: {error}", INSTALL)


def parse_nvidia(text: str) -> Nvidia:
    """Parse the output of `nvidia-smi -q -x`.

    Raises:
        ValueError: an element is missing or is not a number.
        ElementTree.ParseError: the output is not XML.
    """
    log = ElementTree.fromstring(text)  # noqa: S314 - the output of a program that the host's administrator installed
    major, _, minor = _text(log, "cuda_version").partition(".")
    gpus = (_gpu(index, element) for index, element in enumerate(log.iter("gpu")))
    return Nvidia(_text(log, "driver_version"), (int(major), int(minor)), tuple(gpus))


def _gpu(index: int, element: ElementTree.Element) -> Gpu:
    processes = (
        Process(int(_text(p, "pid")), _text(p, "process_name"), _mebibytes(_text(p, "used_memory")))
        for p in element.iter("process_info")
    )
    memory_bytes = _mebibytes(_text(element, "fb_memory_usage/total"))
    return Gpu(index, _text(element, "uuid"), memory_bytes, tuple(processes))


def _text(element: ElementTree.Element, path: str) -> str:
    if not (text := element.findtext(path)):
        raise ValueError(f"it has no element {path}")
    return text


def _mebibytes(text: str) -> int:
    """Convert `40960 MiB` to bytes. `N/A`, which it prints in containers and on Windows, becomes 0."""
    number = text.split()[0]
    return int(number) << 20 if number.isdecimal() else 0
