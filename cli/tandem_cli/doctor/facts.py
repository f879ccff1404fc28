"""Facts about this machine and about the stack that is to run on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tandem_protocol.config.project import ProjectSettings

from .unknown import Unknown

PortState = Literal["free", "own", "taken"]

GENERATOR, TRAINER, PREFLIGHT = "generator", "trainer", "preflight"
SERVICES = (GENERATOR, TRAINER)
"""The services that get devices."""


@dataclass(frozen=True)
class DockerEngine:
    """The Docker engine, and the host that it runs on."""

    version: str
    has_nvidia_toolkit: bool
    """True if it accepts reservations with `driver: nvidia`."""
    cdi_devices: frozenset[str] | Unknown
    """CDI names that this engine can give to a container, such as `nvidia.com/gpu=0`."""
    memory_bytes: int
    cpus: int
    root_dir: Path
    is_this_host: bool = True
    """False if the engine runs on another machine, whose paths, ports and memory this process cannot see."""


@dataclass(frozen=True)
class Image:
    """An image that the engine has."""

    name: str
    user: str
    env: Mapping[str, str]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Devices:
    """One reservation of devices: `ids`, or a number of them (`count`; -1 is all)."""

    driver: str
    ids: tuple[str, ...] = ()
    count: int | None = None


@dataclass(frozen=True)
class Mount:
    """A volume or host folder that is mounted into a service."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Port:
    """A port of a service that is published on the host."""

    host_ip: str
    number: int
    state: PortState | Unknown = "free"
    """`own`: this stack is running and uses it."""


@dataclass(frozen=True)
class ComposeService:
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
        """Return what is mounted at the path `target`."""
        return next((mount for mount in self.mounts if mount.target == target), None)


@dataclass(frozen=True)
class Volume:
    """A named volume."""

    name: str
    options: Mapping[str, str] | None = None
    """Configured mount options of a tmpfs volume. None: it is not a tmpfs."""
    created: Mapping[str, str] | None = None
    """Options that an existing volume was created with, and keeps. None: it does not exist yet."""


@dataclass(frozen=True)
class Stack:
    """The merged configuration: compose.yaml, its overrides and .env."""

    name: str
    services: Mapping[str, ComposeService]
    volumes: Mapping[str, Volume]

    @property
    def project_folder(self) -> Path:
        """The project's folder on the host, which the preflight copies."""
        mount = self.services[PREFLIGHT].mount("/source")
        return Path(mount.source if mount else "")

    @property
    def uses_gpus(self) -> bool:
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
    """What nvidia-smi reports of this machine."""

    driver: str
    cuda: tuple[int, int]
    """The newest CUDA version that the driver supports."""
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Model:
    """Sizes of the model, from its config.json and the headers of its safetensors files."""

    where: str
    """Its place, as messages show it: `the folder …`, `the volume at …`, `the hub (…)`."""
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    is_local: bool = True
    """True if it is on this host or on a volume. False: the preflight has to download it."""


@dataclass(frozen=True)
class Access:
    """Result of using the weights volume in a container, per service: None if it worked, otherwise the error."""

    trainer_writes: str | None
    generator_reads: str | None


@dataclass(frozen=True)
class MachineFacts:
    """All facts that the checks use."""

    engine: DockerEngine | Unknown
    compose_version: str | Unknown
    stack: Stack | Unknown
    images: Mapping[str, Image | Unknown]
    """The image of each service."""
    nvidia: Nvidia | Unknown
    available_bytes: int | Unknown
    """Free memory according to /proc/meminfo."""
    disk_free_bytes: int | Unknown
    """Free disk space where the engine keeps its volumes."""
    settings: ProjectSettings | Unknown
    """The project's configuration as the services will read it."""
    model: Model | Unknown
    access: Access | Unknown
    own_pids: frozenset[int] = frozenset()
    """Processes of this stack, if it is running."""
