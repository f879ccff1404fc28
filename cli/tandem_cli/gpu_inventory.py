"""Lists the GPUs of this host that containers can get, according to nvidia-smi and CDI."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

Driver = Literal["nvidia", "cdi"]
"""What gives a GPU to a container: NVIDIA's container runtime, or the Docker engine with a CDI specification."""

NVIDIA_SMI_TIMEOUT_S = 30.0
"""Generous, since without the persistence daemon the first call after a boot initializes every GPU."""
ENGINE_TIMEOUT_S = 10
CDI_DIRS = ("/etc/cdi", "/var/run/cdi")
"""Folders in which engines look for CDI specifications by default."""

_GPU = re.compile(r"^GPU (\d+): .*\(UUID: (GPU-[\w-]+)\)", re.MULTILINE)
_MIG = re.compile(r"^\s+MIG .*\(UUID: (MIG-[\w/-]+)\)", re.MULTILINE)


class DevicesUnknown(Exception):
    """The devices could not be listed; the message says why."""


class Host(NamedTuple):
    """The GPUs of this host."""

    names: frozenset[str]
    """Devices that the driver can give to a container. Empty if they could not be listed."""
    uuids: dict[str, str]
    """Index → UUID. Empty if nvidia-smi is not available."""
    notes: list[str]
    """What could not be listed, and why."""


def look_for_gpus(driver: Driver) -> Host:
    """List the GPUs that `driver` can give to a container on this host."""
    uuids: dict[str, str] = {}
    try:
        uuids = gpu_uuids()
    except DevicesUnknown as error:
        if driver == "nvidia":
            return Host(frozenset(), uuids, [_not_checked(error)])
    if driver == "nvidia":
        return Host(frozenset({*uuids, *uuids.values()}), uuids, [])
    try:
        return Host(cdi_devices(engine_info()), uuids, [])
    except DevicesUnknown as error:
        return Host(frozenset(), uuids, [_not_checked(error)])


def _not_checked(why: DevicesUnknown) -> str:
    return f"{why}, so it was not checked whether the devices exist"


def nvidia_smi(*arguments: str) -> str:
    """Return what nvidia-smi prints.

    Raises:
        DevicesUnknown: it is not installed, fails or does not answer in time.
    """
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise DevicesUnknown(f"nvidia-smi failed: {(error.stdout + error.stderr).strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DevicesUnknown(f"nvidia-smi does not run: {error}") from error
    return done.stdout


def gpu_uuids() -> dict[str, str]:
    """Return index → UUID of this host's GPUs. A MIG slice has no index: its UUID maps to itself.

    Raises:
        DevicesUnknown: nvidia-smi is not available.
    """
    listing = nvidia_smi("-L")
    return dict(_GPU.findall(listing)) | {uuid: uuid for uuid in _MIG.findall(listing)}


def engine_info() -> dict[str, Any]:
    """Return what `docker info` reports.

    Raises:
        DevicesUnknown: no Docker engine answers.
    """
    import docker  # imported late: only CDI devices are asked from the engine
    from docker.errors import DockerException

    try:
        info: dict[str, Any] = docker.from_env(timeout=ENGINE_TIMEOUT_S).info()
    except DockerException as error:
        raise DevicesUnknown(f"no Docker engine answers: {error}") from error
    return info


def cdi_devices(info: Mapping[str, Any]) -> frozenset[str]:
    """Return the CDI names of an engine's devices.

    Newer engines report them. For older ones, the specifications in the engine's folders are read.

    Args:
        info: what `engine_info` returns.

    Raises:
        DevicesUnknown: no device was found.
    """
    reported = {device["ID"] for device in info.get("DiscoveredDevices") or () if device.get("Source") == "cdi"}
    folders: Sequence[str] = info.get("CDISpecDirs", CDI_DIRS) or ()
    specs = [path for folder in folders for path in Path(folder).glob("*")]
    names = reported or {name for path in specs for name in _read_spec(path)}
    if not folders and not names:
        raise DevicesUnknown("the engine reports no CDI device, since CDI is off")
    if not names:
        where = " and ".join(folders)
        raise DevicesUnknown(f"the engine reports no CDI device, and there is no specification in {where}")
    return frozenset(names)


def _read_spec(path: Path) -> list[str]:
    """Return the names that a CDI specification declares; empty if the file is not a specification."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        return []
    try:
        text = path.read_text()
        spec = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return [f"{spec['kind']}={device['name']}" for device in spec["devices"]]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return []  # the engine cannot read it either, and logs that
