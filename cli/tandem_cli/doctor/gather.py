"""Gathers the facts; every question to another program or machine has a deadline."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import docker

from tandem_protocol.config import ConfigError, load

from . import engine as engines
from .compose import compose_version, read_stack
from .facts import GENERATOR, PREFLIGHT, TRAINER, DockerEngine, Facts, Image, Model, Stack
from .hub import ask_hub
from .model import NO_MODEL, read_model
from .nvidia import read_nvidia
from .settings import Settings
from .unknown import Refused, Unknown
from .volumes import PREPARE, Workshop

MEMINFO = Path("/proc/meminfo")
ELSEWHERE = Unknown("the engine runs on another machine")


def gather(project: Path | None) -> Facts:
    """Everything; `project` in place of TANDEM_PROJECT."""
    client, stack = engines.connect(), read_stack(project)
    images: Mapping[str, Image | Unknown] = {}
    engine = client if isinstance(client, Unknown) else engines.describe(client)
    if not (isinstance(client, Unknown) or isinstance(engine, Unknown) or isinstance(stack, Unknown)):
        stack = engines.look_at_volumes(client, engines.look_at_ports(client, engine, stack))
        images = {name: engines.find_image(client, service.image) for name, service in stack.services.items()}
    settings = read_settings(stack, images)
    workshop = _workshop(client, stack, images)
    return Facts(
        engine=engine,
        compose_version=compose_version(),
        stack=stack,
        images=images,
        nvidia=read_nvidia() if isinstance(stack, Stack) and stack.wants_gpus else Unknown("no service wants a GPU"),
        available_bytes=read_available_memory(engine),
        disk_free_bytes=read_disk(engine),
        settings=settings,
        model=find_model(stack, settings, workshop),
        access=workshop if isinstance(workshop, Unknown) else workshop.try_weights(),
        own_pids=workshop.pids() if isinstance(workshop, Workshop) else frozenset(),
    )


def _workshop(
    client: docker.DockerClient | Unknown, stack: Stack | Unknown, images: Mapping[str, Image | Unknown]
) -> Workshop | Unknown:
    if isinstance(client, Unknown):
        return client
    if isinstance(stack, Unknown):
        return stack
    return Workshop(client, stack, {name: image for name, image in images.items() if isinstance(image, Image)})


def read_settings(stack: Stack | Unknown, images: Mapping[str, Image | Unknown]) -> Settings | Unknown:
    """The project's configuration as the services read it: with the environment of image and service."""
    if isinstance(stack, Unknown):
        return stack
    env: dict[str, str] = {}
    for name in (GENERATOR, TRAINER):
        image = images.get(name)
        env |= image.env if isinstance(image, Image) else {}
        env |= stack.services[name].env
    try:
        return load(Settings, path=stack.project_folder / "config.yaml", env=env)[0]
    except ConfigError as error:
        return Refused(
            "the project cannot be used", "correct it; TANDEM_PROJECT or --project names its folder", str(error)
        )


def find_model(stack: Stack | Unknown, settings: Settings | Unknown, workshop: Workshop | Unknown) -> Model | Unknown:
    """In the project, on the stack's volumes, or on the hub."""
    if isinstance(stack, Unknown) or isinstance(settings, Unknown):
        return Unknown("the project is not known")
    name, folder = settings.shared.model, stack.project_folder
    if (folder / name).is_dir():
        return read_model(folder / name)
    found = workshop if isinstance(workshop, Unknown) else workshop.find_model(name)
    if isinstance(found, Model | Refused):
        return found
    if "/" not in name and (folder / "prepare.py").exists():
        return Unknown(NO_MODEL, PREPARE, f"{folder.name}/prepare.py, which makes it, has not run yet")
    return ask_hub(name, settings.shared.revision, stack.services[PREFLIGHT])


def read_available_memory(engine: DockerEngine | Unknown) -> int | Unknown:
    if isinstance(engine, Unknown) or not engine.is_this_host:
        return ELSEWHERE
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return Unknown(f"{MEMINFO} does not tell how much memory is free")


def read_disk(engine: DockerEngine | Unknown) -> int | Unknown:
    """Free bytes where the engine keeps its volumes."""
    if isinstance(engine, Unknown):
        return engine
    if not engine.is_this_host:
        return ELSEWHERE
    try:
        return shutil.disk_usage(engine.root_dir).free
    except OSError as error:
        return Unknown(f"the engine's {engine.root_dir} cannot be looked at from here: {error.strerror}")
