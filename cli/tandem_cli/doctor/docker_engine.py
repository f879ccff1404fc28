"""Queries to the Docker engine: its version and devices, the stack's images, ports and volumes."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import docker
from docker.errors import DockerException, ImageNotFound

from ..gpu_inventory import DevicesUnknown, cdi_devices
from .compose import parse_options
from .facts import ComposeService, DockerEngine, Image, Port, PortState, Stack, Volume
from .unknown import Unknown

TIMEOUT_S = 20
PROJECT_LABEL = "com.docker.compose.project"
TOOLKIT_HOOK = "nvidia-container-runtime-hook"
"""The engine offers `driver: nvidia` when it finds this program."""
JOIN_GROUP = "run `sudo usermod -aG docker $USER`, which lets your user use Docker, then log in again"
START_DOCKER = "start Docker (`sudo systemctl start docker`) or set DOCKER_HOST; `docker version` must show a server"


def connect() -> docker.DockerClient | Unknown:
    """Connect to the engine that `docker compose` would use."""
    try:
        client = docker.from_env(timeout=TIMEOUT_S)
        client.ping()
    except DockerException as error:
        where = f"DOCKER_HOST={os.environ['DOCKER_HOST']}: " if "DOCKER_HOST" in os.environ else ""
        fix = JOIN_GROUP if "Permission denied" in str(error) else START_DOCKER
        return Unknown("no Docker engine answers", fix, f"{where}{error}")
    return client


def describe_engine(client: docker.DockerClient) -> DockerEngine | Unknown:
    """Return what `docker info` reports."""
    try:
        info = client.info()
    except DockerException as error:
        return Unknown("`docker info` fails", START_DOCKER, str(error))
    try:
        cdi: frozenset[str] | Unknown = cdi_devices(info)
    except DevicesUnknown as error:
        cdi = Unknown(str(error))
    return DockerEngine(
        version=info["ServerVersion"],
        has_nvidia_toolkit="nvidia" in (info.get("Runtimes") or {}) or shutil.which(TOOLKIT_HOOK) is not None,
        cdi_devices=cdi,
        memory_bytes=info["MemTotal"],
        cpus=info["NCPU"],
        root_dir=Path(info["DockerRootDir"]),
        is_this_host=info["Name"] == socket.gethostname(),
    )


def find_image(client: docker.DockerClient, name: str) -> Image | Unknown:
    """Return what `docker image inspect` reports."""
    try:
        config = client.images.get(name).attrs["Config"]
    except ImageNotFound:
        return Unknown(f"the engine has no image {name}", "run `docker compose build`")
    except DockerException as error:
        return Unknown(f"the image {name} cannot be inspected: {error}")
    env = dict(line.partition("=")[::2] for line in config.get("Env") or ())
    return Image(name, config.get("User", ""), env, config.get("Labels") or {})


def look_at_ports(client: docker.DockerClient, engine: DockerEngine, stack: Stack) -> Stack:
    """Return the stack with the state of its published ports filled in."""
    elsewhere = None if engine.is_this_host else Unknown("the engine runs on another machine")
    own = _published_by(client, stack.name)

    def with_states(service: ComposeService) -> ComposeService:
        ports = tuple(replace(port, state=elsewhere or _state(port, own)) for port in service.ports)
        return replace(service, ports=ports)

    services: Mapping[str, ComposeService] = {name: with_states(service) for name, service in stack.services.items()}
    return replace(stack, services=services)


def look_at_volumes(client: docker.DockerClient, stack: Stack) -> Stack:
    """Return the stack with the options that its existing tmpfs volumes were created with."""

    def with_created_options(volume: Volume) -> Volume:
        try:
            options = client.volumes.get(volume.name).attrs.get("Options") or {}
        except DockerException:
            return volume
        return replace(volume, created=parse_options(options))

    volumes = {key: with_created_options(v) if v.options is not None else v for key, v in stack.volumes.items()}
    return replace(stack, volumes=volumes)


def _published_by(client: docker.DockerClient, project: str) -> set[int]:
    """Return the host's ports that the containers of a compose project use."""
    containers = client.containers.list(ignore_removed=True, filters={"label": f"{PROJECT_LABEL}={project}"})
    # Docker gives None for a port that is not published.
    bindings_by_port = [bindings for container in containers for bindings in container.ports.values() if bindings]
    return {int(binding["HostPort"]) for bindings in bindings_by_port for binding in bindings}


def _state(port: Port, own: set[int]) -> PortState | Unknown:
    if port.number in own:
        return "own"
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host_ip, port.number))
        except PermissionError:
            return Unknown(f"port {port.number} can only be opened by root, so it was not tried")
        except OSError:
            return "taken"
    return "free"
