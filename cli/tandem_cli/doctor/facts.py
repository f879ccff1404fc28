"""What the doctor knows of a machine and of the stack that is to run on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .settings import Settings
from .unknown import Unknown

PortState = Literal["free", "own", "taken"]

GENERATOR, TRAINER, PREFLIGHT = "generator", "trainer", "preflight"
SERVICES = (GENERATOR, TRAINER)
"""Those that have devices."""


@dataclass(frozen=True)
class DockerEngine:
    """The Docker engine that answers, and the host that it runs on."""

    version: str
    has_nvidia_toolkit: bool
    """Whether it can serve reservations with `driver: nvidia`."""
    cdi_devices: frozenset[str] | Unknown
    """`nvidia.com/gpu=0` …: those that this daemon can hand out."""
    memory_bytes: int
    cpus: int
    root_dir: Path
    is_this_host: bool = True
    """Whether its paths, ports and memory are those that can be looked at from here."""


@dataclass(frozen=True)
class Image:
    """An image on that engine."""

    name: str
    user: str
    env: Mapping[str, str]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Devices:
    """One reservation of devices: named ones, or so many of them (-1: all)."""

    driver: str
    ids: tuple[str, ...] = ()
    count: int | None = None


@dataclass(frozen=True)
class Mount:
    """A volume or host folder in a service."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Port:
    """A port of a service that is published on the host."""

    host_ip: str
    number: int
    state: PortState | Unknown = "free"
    """`own`: this very stack runs and has it."""


@dataclass(frozen=True)
class Service:
    """A service of the merged configuration."""

    image: str
    is_built: bool = True
    cpuset: str = ""
    user: str = ""
    shm_bytes: int = 64 << 20
    env: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[Devices, ...] = ()
    mounts: tuple[Mount, ...] = ()
    ports: tuple[Port, ...] = ()
    replicas: int = 1

    def mount(self, target: str) -> Mount | None:
        return next((mount for mount in self.mounts if mount.target == target), None)


@dataclass(frozen=True)
class Volume:
    """A named volume; `options` are those of its tmpfs, where it is one."""

    name: str
    options: Mapping[str, str] | None = None
    made: Mapping[str, str] | None = None
    """The options that it was made with and keeps, where it is there."""


@dataclass(frozen=True)
class Stack:
    """The merged configuration: compose.yaml, its overrides and .env."""

    name: str
    services: Mapping[str, Service]
    volumes: Mapping[str, Volume]

    @property
    def project_folder(self) -> Path:
        """What the preflight copies."""
        mount = self.services[PREFLIGHT].mount("/source")
        return Path(mount.source if mount else "")

    @property
    def wants_gpus(self) -> bool:
        return any(service.devices for service in self.services.values())


@dataclass(frozen=True)
class Process:
    """A process on a GPU."""

    pid: int
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    memory_bytes: int
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True)
class Nvidia:
    """What nvidia-smi says of this machine."""

    driver: str
    cuda: tuple[int, int]
    """The newest CUDA that the driver can run."""
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Model:
    """Sizes of the model, from its config.json and the headers of its safetensors files."""

    where: str
    """For the person: `the folder …`, `the cache volume`, `the hub`."""
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    is_local: bool = True
    """On this host or a volume: nothing has to be fetched."""


@dataclass(frozen=True)
class Access:
    """What the services' own users could do in short-lived containers: None, or the error."""

    trainer_writes: str | None
    generator_reads: str | None


@dataclass(frozen=True)
class Facts:
    """All of it."""

    engine: DockerEngine | Unknown
    compose_version: str | Unknown
    stack: Stack | Unknown
    images: Mapping[str, Image | Unknown]
    """By service."""
    nvidia: Nvidia | Unknown
    available_bytes: int | Unknown
    """Of memory, as /proc/meminfo says."""
    disk_free_bytes: int | Unknown
    """Where the engine keeps its volumes."""
    settings: Settings | Unknown
    """As the services will read them."""
    model: Model | Unknown
    access: Access | Unknown
    own_pids: frozenset[int] = frozenset()
    """Processes of this very stack, where it runs."""
