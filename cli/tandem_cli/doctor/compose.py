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

from .facts import PREFLIGHT, SERVICES, Devices, Mount, Port, Service, Stack, Volume
from .unknown import Unknown

TIMEOUT_S = 60.0
RUN_IT_THERE = "run `tandem doctor` where Tandem's compose.yaml is; `docker compose config` has to print the stack"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)b?")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def compose_version() -> str | Unknown:
    return _compose("version", "--short", env={})


def read_stack(project: Path | None) -> Stack | Unknown:
    """The stack of the current directory; `project` as TANDEM_PROJECT would say it."""
    text = _compose("config", "--format", "json", env={"TANDEM_PROJECT": str(project)} if project else {})
    if isinstance(text, Unknown):
        return text
    stack = parse_stack(json.loads(text))
    if missing := [name for name in (PREFLIGHT, *SERVICES) if name not in stack.services]:
        return Unknown("the configuration is not Tandem's", RUN_IT_THERE, f"it has no {' and no '.join(missing)}")
    return stack


def _compose(*arguments: str, env: Mapping[str, str]) -> str | Unknown:
    """What `docker compose` prints; it needs no engine for what is asked here."""
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
        return Unknown("docker compose cannot be asked", "install Docker with its compose plugin", str(error))
    if done.returncode:
        return Unknown(f"docker compose {arguments[0]} fails", RUN_IT_THERE, " ".join(done.stderr.split()))
    return done.stdout.strip()


def parse_stack(config: Mapping[str, Any]) -> Stack:
    """From what `docker compose config --format json` prints."""
    return Stack(
        config["name"],
        {name: _service(service) for name, service in config["services"].items()},
        {key: _volume(key, volume or {}) for key, volume in config.get("volumes", {}).items()},
    )


def _service(service: Mapping[str, Any]) -> Service:
    return Service(
        image=service.get("image", ""),
        is_built="build" in service,
        cpuset=service.get("cpuset", ""),
        user=str(service.get("user", "")),
        shm_bytes=parse_size(service.get("shm_size", "64m")),
        env={name: value or "" for name, value in (service.get("environment") or {}).items()},
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
    """What is reserved under `deploy`, asked for by `gpus`, or named as a CDI device."""
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", ())
    for request in [*reserved, *service.get("gpus", ())]:
        ids, wanted = tuple(request.get("device_ids") or ()), request.get("count", "all")
        count = None if ids else -1 if wanted == "all" else int(wanted)
        yield Devices(request.get("driver") or "nvidia", ids, count)
    sources = (d if isinstance(d, str) else d.get("source", "") for d in service.get("devices", ()))
    if named := tuple(source.partition(":")[0] for source in sources if source.startswith(CDI_KIND)):
        yield Devices(driver="cdi", ids=named)


def _port(port: Mapping[str, Any]) -> Port:
    return Port(port.get("host_ip") or "0.0.0.0", int(str(port["published"]).partition("-")[0]))  # noqa: S104 - compose's default


def _volume(key: str, volume: Mapping[str, Any]) -> Volume:
    options = volume.get("driver_opts") or {}
    return Volume(volume.get("name", key), parse_options(options) if options.get("type") == "tmpfs" else None)


def parse_options(driver_opts: Mapping[str, str]) -> dict[str, str]:
    """A volume's mount options: `size=1g,uid=10001` → `{"size": "1g", "uid": "10001"}`."""
    pairs = (word.partition("=") for word in driver_opts.get("o", "").split(",") if word)
    return {name: value for name, _, value in pairs}


def parse_size(text: str | int) -> int:
    """`1g`, `512m`, `1073741824` → bytes.

    Raises:
        ValueError: it is no size.
    """
    if not (found := _SIZE.fullmatch(str(text).strip().lower())):
        raise ValueError(f"got the size {text!r}, expected a number with b, k, m, g or t")
    return int(float(found[1]) * _UNITS[found[2]])
