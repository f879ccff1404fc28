"""Facts for the doctor: a machine and a stack that pass every check. Tests change one fact at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem_cli.doctor.facts import (
    Access,
    ComposeService,
    Devices,
    DockerEngine,
    Gpu,
    Image,
    MachineFacts,
    Model,
    Mount,
    Nvidia,
    Stack,
    Volume,
)
from tandem_cli.doctor.unknown import Unknown
from tandem_protocol.config.project import ProjectSettings

GIB = 1 << 30
SMALL = Model("the folder /p/model", 860_000, 4, 128, 384, 4, 32, 24, 64)
QWEN = Model("the cache volume", 1_543_714_304, 28, 1536, 8960, 2, 128, 151_936, 32_768)
"""The sizes of Qwen2.5-1.5B."""
UUIDS = tuple(f"GPU-{index:08x}-c1d2" for index in range(8))


def on_cpus() -> MachineFacts:
    """Return the facts of examples/digits on a laptop."""
    return MachineFacts(
        engine=DockerEngine("26.1.5", False, Unknown("CDI is off"), 16 * GIB, 8, Path("/var/lib/docker")),
        compose_version="2.26.1",
        stack=a_stack(generator={"cpuset": "0-3"}, trainer={"cpuset": "4-7"}),
        images={name: an_image(name) for name in ("preflight", "generator", "trainer")},
        nvidia=Unknown("no service requests a GPU"),
        available_bytes=12 * GIB,
        disk_free_bytes=50 * GIB,
        settings=settings(generator={"env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}),
        model=SMALL,
        access=Access(None, None),
    )


def on_gpus() -> MachineFacts:
    """Return the facts of a model with 1.5 B parameters on a host with eight GPUs of 80 GiB."""
    laptop = on_cpus()
    stack = a_stack(
        generator={"devices": (Devices("nvidia", ("0", "1")),)}, trainer={"devices": (Devices("nvidia", ("4", "5")),)}
    )
    assert isinstance(laptop.engine, DockerEngine)
    return replace(
        laptop,
        engine=replace(laptop.engine, has_nvidia_toolkit=True, memory_bytes=512 * GIB),
        stack=replace(stack, volumes={"weights": Volume("tandem_weights", {"size": "24g", "uid": "10001"})}),
        images={name: an_image(name, CUDA_VERSION="12.8.1") for name in laptop.images},
        nvidia=Nvidia("570.86.15", (12, 8), tuple(Gpu(i, UUIDS[i], 80 * GIB) for i in range(8))),
        available_bytes=500 * GIB,
        disk_free_bytes=500 * GIB,
        settings=settings(generator={"tensor_parallel_size": 2}),
        model=QWEN,
    )


def settings(**sections: Mapping[str, Any]) -> ProjectSettings:
    trainer = {"max_steps": 1, "rewards": [{"function": "rewards:score"}], **sections.pop("trainer", {})}
    return ProjectSettings.model_validate({"shared": {"model": "model"}, **sections, "trainer": trainer})


def an_image(name: str, **env: str) -> Image:
    return Image(f"tandem-{name}:cpu", "10001:10001", env, {"org.opencontainers.image.revision": "4f5c2a1"})


def a_stack(**changes: Mapping[str, Any]) -> Stack:
    """Return the stack of compose.yaml. `changes`: service → fields to change."""
    weights = Mount("weights", "/weights")
    services = {
        "preflight": ComposeService("tandem-trainer:cpu", mounts=(Mount("/p", "/source", True),)),
        "generator": ComposeService("tandem-generator:cpu", shm_bytes=GIB, mounts=(replace(weights, read_only=True),)),
        "trainer": ComposeService("tandem-trainer:cpu", shm_bytes=GIB, mounts=(weights,)),
    }
    volumes = {"weights": Volume("tandem_weights", {"size": "1g", "uid": "10001", "mode": "0750"})}
    changed = {name: replace(service, **changes.get(name, {})) for name, service in services.items()}
    return Stack("tandem", changed, volumes)


def changed(facts: MachineFacts, service: str, **fields: Any) -> MachineFacts:
    """Return the facts with some fields of one service changed."""
    assert isinstance(facts.stack, Stack)
    services = {**facts.stack.services, service: replace(facts.stack.services[service], **fields)}
    return replace(facts, stack=replace(facts.stack, services=services))
