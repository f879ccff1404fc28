"""Which GPUs there are to be handed out: what nvidia-smi and CDI say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import docker
import yaml
from docker.errors import DockerException

Driver = Literal["nvidia", "cdi"]
"""Who hands a GPU out: NVIDIA's container runtime, or the engine by a CDI specification."""

NVIDIA_SMI_TIMEOUT_S = 30.0
"""The first call after a start without the persistence daemon initializes every GPU."""
ENGINE_TIMEOUT_S = 10
CDI_DIRS = ("/etc/cdi", "/var/run/cdi")
"""Where engines look for CDI specifications unless told otherwise."""

_GPU = re.compile(r"^GPU (\d+): .*\(UUID: (GPU-[\w-]+)\)", re.MULTILINE)
_MIG = re.compile(r"^\s+MIG .*\(UUID: (MIG-[\w/-]+)\)", re.MULTILINE)


class DevicesUnknown(Exception):
    """It cannot be told which devices there are; the message says why."""


class Host(NamedTuple):
    """What can be told of the GPUs here."""

    names: frozenset[str]
    """Those that the driver hands out; empty where it cannot be told."""
    uuids: dict[str, str]
    """Index → UUID, where that can be told."""
    notes: list[str]
    """What could not be told, and why."""


def look_for_gpus(driver: Driver) -> Host:
    """The GPUs that `driver` hands out here."""
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
    return f"{why}; whether the devices exist was not checked"


def nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints.

    Raises:
        DevicesUnknown: it is not here, fails or does not answer.
    """
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise DevicesUnknown(f"nvidia-smi failed: {(error.stdout + error.stderr).strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DevicesUnknown(f"nvidia-smi cannot be asked: {error}") from error
    return done.stdout


def gpu_uuids() -> dict[str, str]:
    """Index → UUID of this host's GPUs, and the UUID of each MIG slice → itself.

    Raises:
        DevicesUnknown: there is no nvidia-smi that could tell.
    """
    listing = nvidia_smi("-L")
    return dict(_GPU.findall(listing)) | {uuid: uuid for uuid in _MIG.findall(listing)}


def engine_info() -> dict[str, Any]:
    """The Docker engine's account of itself.

    Raises:
        DevicesUnknown: no engine answers.
    """
    try:
        info: dict[str, Any] = docker.from_env(timeout=ENGINE_TIMEOUT_S).info()
    except DockerException as error:
        raise DevicesUnknown(f"no Docker engine answers: {error}") from error
    return info


def cdi_devices(info: Mapping[str, Any]) -> frozenset[str]:
    """The CDI names that an engine hands out: what it says, or the specifications in the folders that it reads.

    Args:
        info: the engine's (`engine_info`); without one, the usual folders are read.

    Raises:
        DevicesUnknown: none is to be seen from here.
    """
    told = {device["ID"] for device in info.get("DiscoveredDevices") or () if device.get("Source") == "cdi"}
    folders: Sequence[str] = info.get("CDISpecDirs", CDI_DIRS) or ()
    names = told or {name for folder in folders for path in Path(folder).glob("*") for name in _read_spec(path)}
    if not names:
        where = " and ".join(folders) or "no folder, since CDI is off in the engine"
        raise DevicesUnknown(f"the engine names no CDI device, and its specifications were looked for in {where}")
    return frozenset(names)


def _read_spec(path: Path) -> list[str]:
    """The names that a CDI specification declares; none for a file that is no specification."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        return []
    try:
        text = path.read_text()
        spec = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return [f"{spec['kind']}={device['name']}" for device in spec["devices"]]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return []  # the engine cannot read it either, and says so
