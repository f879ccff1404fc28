"""The configuration as `docker compose` merges it: compose.yaml, overrides, .env and the environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tandem_protocol.device_sets import CDI_KIND

from ..checkout import installed_from
from .facts import PREFLIGHT, SERVICES, ComposeService, Devices, Mount, Port, Stack, Volume
from .unknown import Unknown

TIMEOUT_S = 60.0
RUN_IN_CHECKOUT = (
    "run `tandem doctor` in the folder with Tandem's compose.yaml{}; `docker compose config` must print the stack there"
).format(f", {checkout}" if (checkout := installed_from()) else "")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)b?")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def compose_version() -> str | Unknown:
    return _compose("version", "--short", env={})


def read_stack(project: Path | None) -> Stack | Unknown:
    """Read the stack of the current directory. `project` takes the place of TANDEM_PROJECT."""
    text = _compose("config", "--format", "json", env={"TANDEM_PROJECT": str(project)} if project else {})
    if isinstance(text, Unknown):
        return text
    stack = parse_stack(json.loads(text))
    if missing := [name for name in (PREFLIGHT, *SERVICES) if name not in stack.services]:
        return Unknown(
            "this is not Tandem's compose configuration", RUN_IN_CHECKOUT, f"it has no {' and no '.join(missing)}"
        )
    return stack


def _compose(*arguments: str, env: Mapping[str, str]) -> str | Unknown:
    """Return what `docker compose` prints. The commands used here need no Docker engine."""
    try:
        done = subprocess.run(
            ["docker", "compose", *arguments],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unknown("docker compose does not run", "install Docker with its compose plugin", str(error))
    if done.returncode:
        return Unknown(f"docker compose {arguments[0]} fails", RUN_IN_CHECKOUT, " ".join(done.stderr.split()))
    return done.stdout.strip()


def parse_stack(config: Mapping[str, Any]) -> Stack:
    """Parse the output of `docker compose config --format json`."""
    return Stack(
        config["name"],
        {name: _service(service) for name, service in config["services"].items()},
        {key: _volume(key, volume or {}) for key, volume in config.get("volumes", {}).items()},
    )


def _service(service: Mapping[str, Any]) -> ComposeService:
    return ComposeService(
        image=service.get("image", ""),
        is_built="build" in service,
        cpuset=service.get("cpuset", ""),
        user=str(service.get("user", "")),
        shm_bytes=parse_size(service.get("shm_size", "64m")),
        # null: a variable of the host that is not set there, so the container does not have it either
        env={name: value for name, value in (service.get("environment") or {}).items() if value is not None},
        devices=tuple(_devices(service)),
        mounts=tuple(
            Mount(v.get("source", ""), v["target"], v.get("read_only", False)) for v in service.get("volumes", ())
        ),
        ports=tuple(_port(port) for port in service.get("ports", ()) if port.get("published")),
        replicas=_replicas(service),
    )


def _replicas(service: Mapping[str, Any]) -> int:
    return int(service.get("scale") or service.get("deploy", {}).get("replicas") or 1)


def _devices(service: Mapping[str, Any]) -> Iterator[Devices]:
    """Yield the devices that are reserved under `deploy`, requested by `gpus`, or listed as CDI names in `devices`."""
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", ())
    for request in [*reserved, *service.get("gpus", ())]:
        ids = tuple(request.get("device_ids") or ())
        count = None if ids else _count(request.get("count", "all"))
        yield Devices(request.get("driver") or "nvidia", ids, count)
    sources = (d if isinstance(d, str) else d.get("source", "") for d in service.get("devices", ()))
    if named := tuple(source.partition(":")[0] for source in sources if source.startswith(CDI_KIND)):
        yield Devices(driver="cdi", ids=named)


def _count(requested: str | int) -> int:
    return -1 if requested == "all" else int(requested)


def _port(port: Mapping[str, Any]) -> Port:
    host_ip = port.get("host_ip") or "0.0.0.0"  # noqa: S104 - compose's default
    return Port(host_ip, int(str(port["published"]).partition("-")[0]))


def _volume(key: str, volume: Mapping[str, Any]) -> Volume:
    options = volume.get("driver_opts") or {}
    return Volume(volume.get("name", key), parse_options(options) if options.get("type") == "tmpfs" else None)


def parse_options(driver_opts: Mapping[str, str]) -> dict[str, str]:
    """Parse a volume's mount options: `size=1g,uid=10001` → `{"size": "1g", "uid": "10001"}`."""
    pairs = (word.partition("=") for word in driver_opts.get("o", "").split(",") if word)
    return {name: value for name, _, value in pairs}


def parse_size(text: str | int) -> int:
    """Parse a size to bytes: `1g`, `512m` or `1073741824`.

    Raises:
        ValueError: `text` is not a size.
    """
    if not (found := _SIZE.fullmatch(str(text).strip().lower())):
        raise ValueError(f"got the size {text!r}, expected a number with b, k, m, g or t")
    return int(float(found[1]) * _UNITS[found[2]])
