"""Gathers the facts. Every query to another program or machine has a deadline."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import docker

from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.project import ProjectSettings
from tandem_protocol.config.trl import THE_SCRIPTS, ScriptSettings
from tandem_protocol.memory import machine_bytes
from tandem_protocol.script import SCRIPT_ENV, SETTINGS_FILE

from . import docker_engine
from .compose import compose_version, read_stack
from .facts import GENERATOR, PREFLIGHT, TRAINER, DockerEngine, Image, MachineFacts, Model, Stack
from .hub import ask_hub
from .model import NO_MODEL, read_model
from .nvidia import read_nvidia
from .unknown import Refused, Unknown
from .volumes import PREPARE, VolumeProbe

MEMINFO = Path("/proc/meminfo")
IN_CONTAINER = Path("/.dockerenv")
"""Docker creates this file in every container."""
ELSEWHERE = Unknown("the engine runs on another machine")


def gather(project: Path | None) -> MachineFacts:
    """Gather all facts. `project` takes the place of TANDEM_PROJECT."""
    client = docker_engine.connect()
    stack = read_stack(project)
    images: Mapping[str, Image | Unknown] = {}
    engine = client if isinstance(client, Unknown) else docker_engine.describe_engine(client)
    if not (isinstance(client, Unknown) or isinstance(engine, Unknown) or isinstance(stack, Unknown)):
        stack = docker_engine.look_at_volumes(client, docker_engine.look_at_ports(client, engine, stack))
        images = {name: docker_engine.find_image(client, service.image) for name, service in stack.services.items()}
    settings = read_settings(stack, images)
    probe = _volume_probe(client, stack, images)
    uses_gpus = isinstance(stack, Stack) and stack.uses_gpus
    return MachineFacts(
        engine=engine,
        compose_version=compose_version(),
        stack=stack,
        images=images,
        nvidia=read_nvidia() if uses_gpus else Unknown("no service requests a GPU"),
        available_bytes=read_available_memory(engine),
        disk_free_bytes=read_disk(engine),
        settings=settings,
        model=find_model(stack, settings, probe),
        access=probe if isinstance(probe, Unknown) else probe.try_weights(),
        own_pids=probe.pids() if isinstance(probe, VolumeProbe) else frozenset(),
    )


def _volume_probe(
    client: docker.DockerClient | Unknown, stack: Stack | Unknown, images: Mapping[str, Image | Unknown]
) -> VolumeProbe | Unknown:
    if isinstance(client, Unknown):
        return client
    if isinstance(stack, Unknown):
        return stack
    return VolumeProbe(client, stack, {name: image for name, image in images.items() if isinstance(image, Image)})


def read_settings(stack: Stack | Unknown, images: Mapping[str, Image | Unknown]) -> ProjectSettings | Unknown:
    """Read the project's configuration as the services do: with the environment of image and service."""
    if isinstance(stack, Unknown):
        return stack
    env: dict[str, str] = {}
    for name in (GENERATOR, TRAINER):
        image = images.get(name)
        env |= image.env if isinstance(image, Image) else {}
        env |= stack.services[name].env
    file = stack.project_folder / "config.yaml"
    try:
        if env.get(SCRIPT_ENV):
            file = stack.project_folder / SETTINGS_FILE
            load(ScriptSettings, path=file if file.is_file() else None, env=env, defaults=THE_SCRIPTS)
            return Unknown("the project is a TRL script, and only the script knows its model and its batches")
        return load(ProjectSettings, path=file, env=env)[0]
    except ConfigError as error:
        return Refused(
            "the project's configuration is not valid",
            f"correct {file.name}, or choose another project folder with --project or TANDEM_PROJECT",
            str(error),
        )


def find_model(
    stack: Stack | Unknown, settings: ProjectSettings | Unknown, probe: VolumeProbe | Unknown
) -> Model | Unknown:
    """Look for the model in the project, then on the stack's volumes, then on the hub."""
    if isinstance(stack, Unknown) or isinstance(settings, Unknown):
        return Unknown("the project's configuration could not be read")
    name = settings.shared.model
    folder = stack.project_folder
    if (folder / name).is_dir():
        return read_model(folder / name)
    found = probe if isinstance(probe, Unknown) else probe.find_model(name)
    if isinstance(found, Model | Refused):
        return found
    if "/" not in name and (folder / "prepare.py").exists():
        return Unknown(NO_MODEL, PREPARE, f"{folder.name}/prepare.py, which creates it, has not run yet")
    return ask_hub(name, settings.shared.revision, stack.services[PREFLIGHT])


def read_available_memory(engine: DockerEngine | Unknown) -> int | Unknown:
    """Return the free memory in bytes, according to /proc/meminfo."""
    if isinstance(engine, Unknown) or not engine.is_this_host:
        return ELSEWHERE
    try:
        return machine_bytes(MEMINFO)
    except (OSError, KeyError, ValueError):
        return Unknown(f"{MEMINFO} does not report how much memory is free")


def read_disk(engine: DockerEngine | Unknown) -> int | Unknown:
    """Return the free bytes of the disk on which the engine keeps its volumes."""
    if isinstance(engine, Unknown):
        return engine
    if not engine.is_this_host:
        return ELSEWHERE
    try:
        # A container does not see that folder, but its own files are kept there.
        hidden = IN_CONTAINER.exists() and not engine.root_dir.exists()
        return shutil.disk_usage("/" if hidden else engine.root_dir).free
    except OSError as error:
        return Unknown(f"the engine's folder {engine.root_dir} cannot be read: {error.strerror}")
