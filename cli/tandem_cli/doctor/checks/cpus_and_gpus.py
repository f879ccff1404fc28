"""Devices of the merged configuration: CPU sets and GPUs."""

from __future__ import annotations

import re

from tandem_protocol.config import ConfigError
from tandem_protocol.device_sets import identity, parse_devices, shared_devices

from ..facts import GENERATOR, SERVICES, TRAINER, Devices, Facts, Gpu, Image, Nvidia
from ..finding import Finding, fail, gib, ok, warn
from ..unknown import NotKnown, known

CHOOSE = "tandem gpus --generator 0-3 --trainer 4-7, with GPUs of this host"
TOOLKIT = (
    "install NVIDIA's container toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && "
    "sudo systemctl restart docker"
)
CDI = (
    'set "features": {"cdi": true} in /etc/docker/daemon.json, then: '
    "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml && sudo systemctl restart docker"
)


def cpus(facts: Facts) -> Finding:
    """Disjoint, and this host has them: two services that take turns on a core are slower than one."""
    stack, fix = known(facts.stack), "TANDEM_GENERATOR_CPUS and TANDEM_TRAINER_CPUS: disjoint sets of this host's CPUs"
    texts = {name: stack.services[name].cpuset for name in SERVICES}
    try:
        generator, trainer = (parse_devices(texts[name]) for name in SERVICES)
    except ConfigError as error:
        return fail(str(error), fix)
    if shared := shared_devices(generator, trainer):
        return fail(f"generator {texts[GENERATOR]} and trainer {texts[TRAINER]} share {', '.join(shared)}", fix)
    total = known(facts.engine).cpus
    if beyond := [cpu for cpu in (*generator, *trainer) if int(cpu) >= total]:
        return fail(f"got CPU {', '.join(beyond)}; this host has 0-{total - 1}", fix)
    if not (generator and trainer) and stack.wants_gpus:
        return ok(f"a service without a set runs on any of {total} cores; the GPUs are what counts")
    if not (generator and trainer):
        return warn("a service without a CPU set runs on the other's cores as well", fix)
    return ok(f"generator {texts[GENERATOR]}, trainer {texts[TRAINER]}, of {total} on this host")


def access(facts: Facts) -> Finding:
    """This very daemon can hand out what the configuration asks for."""
    requests = [request for name in SERVICES for request in known(facts.stack).services[name].devices]
    if not requests:
        return ok("no service wants a GPU")
    engine, drivers = known(facts.engine), sorted({request.driver for request in requests})
    if "nvidia" in drivers and not engine.has_nvidia_toolkit:
        return fail("driver nvidia is wanted, and this engine does not have NVIDIA's container toolkit", TOOLKIT)
    if "cdi" in drivers and not isinstance(engine.cdi_devices, frozenset):
        return fail(f"CDI devices are wanted: {engine.cdi_devices.reason}", CDI)
    return ok(f"the engine hands out GPUs by {' and '.join(drivers)}")


def exist(facts: Facts) -> Finding:
    """Each GPU that is named is one that there is: on this host, or of this daemon's CDI devices."""
    stack = known(facts.stack)
    missing, there = set[str](), set[str]()
    for request in (request for name in SERVICES for request in stack.services[name].devices):
        offered = _offered(facts, request)
        there |= offered
        names = {identity(device) for device in offered}
        missing |= {device for device in _ids(facts, request) if identity(device) not in names}
    if missing:
        return fail(f"got GPU {', '.join(sorted(missing))}; there are {', '.join(sorted(there))}", CHOOSE)
    return ok("all that are named exist")


def disjoint(facts: Facts) -> Finding:
    """By UUID where nvidia-smi tells it, so that an index and a UUID for one GPU are seen to be the same."""
    generator, trainer = (gpu_ids(facts, name) for name in SERVICES)
    if shared := shared_devices(generator, trainer, uuids(facts)):
        return fail(
            f"generator {', '.join(generator)} and trainer {', '.join(trainer)} share {', '.join(shared)}",
            f"{CHOOSE}; by hand, never count (it counts from 0 for both), and !override, or lists append",
        )
    return ok(f"generator {', '.join(generator) or 'none'}; trainer {', '.join(trainer) or 'none'}")


def unused(facts: Facts) -> Finding:
    """No other process computes on the GPUs that are wanted: vLLM takes a share of all memory, free or not."""
    wanted = {gpu.uuid: gpu for name in SERVICES for gpu in gpus_of(facts, name)}
    others = [
        f"GPU {gpu.index}: pid {process.pid} ({process.name}, {gib(process.memory_bytes)})"
        for gpu in wanted.values()
        for process in gpu.processes
        if process.pid not in facts.own_pids
    ]
    if others:
        return fail("; ".join(others), f"end those processes, or choose other GPUs: {CHOOSE}")
    return ok("no other process is on them")


def driver(facts: Facts) -> Finding:
    """The driver's newest CUDA is not older than the images' (within a major version, older ones mostly do)."""
    stack = known(facts.stack)
    nvidia, untold = known(facts.nvidia), []
    for name in (name for name in SERVICES if stack.services[name].devices):
        wanted = _cuda(known(facts.images[name]))
        if wanted is None:
            untold.append(name)
        elif nvidia.cuda < wanted:
            what = f"driver {nvidia.driver} runs CUDA {_dotted(nvidia.cuda)}, the {name}'s image has {_dotted(wanted)}"
            fix = f"update the driver to one with CUDA {_dotted(wanted)}, or build on an older CUDA_BASE"
            close = nvidia.cuda[0] == wanted[0]
            return warn(f"{what}: what has to be compiled at run time will fail", fix) if close else fail(what, fix)
    has = f"driver {nvidia.driver} runs CUDA {_dotted(nvidia.cuda)}"
    if untold:
        return warn(f"{has}; the image of {' and '.join(untold)} does not tell its CUDA version (CUDA_VERSION)")
    return ok(f"{has}, not older than the images'")


def gpu_ids(facts: Facts, service: str) -> tuple[str, ...]:
    """The devices of a service, as they are written; a count is spelled out, from 0 on."""
    return tuple(device for request in known(facts.stack).services[service].devices for device in _ids(facts, request))


def gpus_of(facts: Facts, service: str) -> list[Gpu]:
    """The GPUs of a service, as nvidia-smi describes them.

    Raises:
        NotKnown: it knows none of them (they do not exist, or are slices of a GPU).
    """
    wanted = {identity(device, uuids(facts)) for device in gpu_ids(facts, service)}
    found = [gpu for gpu in known(facts.nvidia).gpus if gpu.uuid.lower() in wanted]
    if wanted and not found:
        raise NotKnown(f"nvidia-smi lists none of the {service}'s GPUs")
    return found


def uuids(facts: Facts) -> dict[str, str]:
    """Index → UUID, where it is known."""
    return {str(gpu.index): gpu.uuid for gpu in facts.nvidia.gpus} if isinstance(facts.nvidia, Nvidia) else {}


def _ids(facts: Facts, request: Devices) -> tuple[str, ...]:
    wants_all = request.count == -1 or any(identity(device) == "all" for device in request.ids)
    if request.count is None and not wants_all:
        return request.ids
    number = len(known(facts.nvidia).gpus) if wants_all else request.count
    return tuple(str(index) for index in range(number or 0))


def _offered(facts: Facts, request: Devices) -> set[str]:
    if request.driver == "cdi":
        return set(known(known(facts.engine).cdi_devices))
    return {name for gpu in known(facts.nvidia).gpus for name in (str(gpu.index), gpu.uuid)}


def _cuda(image: Image) -> tuple[int, int] | None:
    """The CUDA version that an image was built with; `NVIDIA_REQUIRE_CUDA` reads `cuda>=12.8 brand=…`."""
    text = f"{image.env.get('CUDA_VERSION', '')} {image.env.get('NVIDIA_REQUIRE_CUDA', '')}"
    found = re.match(r"\s*(?:cuda>=)?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
