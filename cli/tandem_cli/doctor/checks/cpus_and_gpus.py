"""Devices of the merged configuration: CPU sets and GPUs."""

from __future__ import annotations

import re

from tandem_protocol.config import ConfigError
from tandem_protocol.device_sets import identity, parse_devices, repeated_devices, shared_devices, shares_all

from ..facts import GENERATOR, SERVICES, TRAINER, Devices, Gpu, Image, MachineFacts, Nvidia
from ..finding import Finding, fail, gib, ok, warn
from ..unknown import NotKnown, known

CHOOSE_CPUS = "set TANDEM_GENERATOR_CPUS and TANDEM_TRAINER_CPUS to disjoint sets of this host's CPUs"
CHOOSE_GPUS = "run `tandem gpus --generator 0-3 --trainer 4-7` with GPUs of this host"
INSTALL_TOOLKIT = (
    "install NVIDIA's container toolkit, then run `sudo nvidia-ctk runtime configure --runtime=docker && "
    "sudo systemctl restart docker`"
)
TURN_CDI_ON = (
    'set "features": {"cdi": true} in /etc/docker/daemon.json, then run '
    "`sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml && sudo systemctl restart docker`"
)


def cpus(facts: MachineFacts) -> Finding:
    """Check that the CPU sets exist here, and are disjoint or equal.

    If both services work at the same time, threads that share a core wait for each other.
    """
    stack = known(facts.stack)
    texts = {name: stack.services[name].cpuset for name in SERVICES}
    try:
        generator, trainer = (parse_devices(texts[name]) for name in SERVICES)
    except ConfigError as error:
        return fail(str(error), CHOOSE_CPUS)
    shares_cpus = shares_all(generator, trainer)
    if not shares_cpus and (shared := shared_devices(generator, trainer)):
        return fail(
            f"got generator {texts[GENERATOR]} and trainer {texts[TRAINER]}, which share {', '.join(shared)}, "
            "expected disjoint sets",
            CHOOSE_CPUS,
        )
    total = known(facts.engine).cpus
    if beyond := [cpu for cpu in (*generator, *trainer) if int(cpu) >= total]:
        return fail(f"got CPU {', '.join(beyond)}, expected CPUs of this host: 0-{total - 1}", CHOOSE_CPUS)
    if shares_cpus:
        return ok(
            f"both services use {texts[GENERATOR]}, which is faster only if they take turns: with `max_lag: 0`, or for "
            "a script"
        )
    if not (generator and trainer) and stack.uses_gpus:
        return ok(f"a service without a CPU set runs on any of {total} cores, which is fine with GPUs")
    if not (generator and trainer):
        missing = " and ".join(name for name, cpus in ((GENERATOR, generator), (TRAINER, trainer)) if not cpus)
        return warn(f"got no CPU set for {missing}, expected disjoint sets: the services may share cores", CHOOSE_CPUS)
    return ok(f"generator {texts[GENERATOR]}, trainer {texts[TRAINER]}; this host has {total} CPUs")


def access(facts: MachineFacts) -> Finding:
    """Check that this Docker engine supports the drivers that the configuration requests GPUs from."""
    requests = [request for name in SERVICES for request in known(facts.stack).services[name].devices]
    if not requests:
        return ok("no service requests a GPU")
    engine = known(facts.engine)
    drivers = sorted({request.driver for request in requests})
    if "nvidia" in drivers and not engine.has_nvidia_toolkit:
        return fail(
            "got `driver: nvidia` in the configuration, expected an engine that has NVIDIA's container toolkit",
            INSTALL_TOOLKIT,
        )
    if "cdi" in drivers and not isinstance(engine.cdi_devices, frozenset):
        return fail(f"the configuration requests CDI devices, but {engine.cdi_devices.reason}", TURN_CDI_ON)
    return ok(f"the engine provides GPUs through {' and '.join(drivers)}")


def exist(facts: MachineFacts) -> Finding:
    """Check that each GPU in the configuration exists: on this host, or among this engine's CDI devices."""
    stack = known(facts.stack)
    missing = set[str]()
    available = set[str]()
    for request in (request for name in SERVICES for request in stack.services[name].devices):
        offered = _offered(facts, request)
        available |= offered
        names = {identity(device) for device in offered}
        missing |= {device for device in _ids(facts, request) if identity(device) not in names}
    if missing:
        return fail(
            f"got GPU {', '.join(sorted(missing))}, expected devices from this list: {', '.join(sorted(available))}",
            CHOOSE_GPUS,
        )
    return ok("all configured GPUs exist")


def disjoint(facts: MachineFacts) -> Finding:
    """Check that the services share no GPU, and that none is given to a service twice.

    An index and a UUID that name the same GPU count as one, if nvidia-smi is available.
    """
    generator, trainer = (gpu_ids(facts, name) for name in SERVICES)
    if shared := shared_devices(generator, trainer, uuids(facts)):
        return fail(
            f"got generator {', '.join(generator)} and trainer {', '.join(trainer)}, which share {', '.join(shared)}, "
            "expected disjoint sets",
            f"{CHOOSE_GPUS}. In a compose file of yours use device_ids, since `count` starts from GPU 0 for both "
            "services, and `!override`, since compose appends lists",
        )
    for name, devices in ((GENERATOR, generator), (TRAINER, trainer)):
        if repeated := repeated_devices(devices, uuids(facts)):
            return fail(
                f"got {', '.join(devices)} for the {name}, which repeats {', '.join(repeated)}, expected each GPU once",
                CHOOSE_GPUS,
            )
    return ok(f"generator {', '.join(generator) or 'none'}; trainer {', '.join(trainer) or 'none'}")


def unused(facts: MachineFacts) -> Finding:
    """Check that no other process uses the GPUs: vLLM takes a share of all memory, whether it is free or not."""
    requested = {gpu.uuid: gpu for name in SERVICES for gpu in gpus_of(facts, name)}
    others = [
        f"GPU {gpu.index}: pid {process.pid} ({process.name}, {gib(process.memory_bytes)})"
        for gpu in requested.values()
        for process in gpu.processes
        if process.pid not in facts.own_pids
    ]
    if others:
        return fail(
            f"got other processes on the GPUs, expected none: {'; '.join(others)}",
            f"end those processes, or choose other GPUs: {CHOOSE_GPUS}",
        )
    return ok("no other process uses them")


def driver(facts: MachineFacts) -> Finding:
    """Check that the driver supports the images' CUDA version.

    An older driver of the same major version mostly works, so it gives a warning.
    """
    stack = known(facts.stack)
    nvidia = known(facts.nvidia)
    unlabelled = []
    for name in (name for name in SERVICES if stack.services[name].devices):
        required = _cuda(known(facts.images[name]))
        if required is None:
            unlabelled.append(name)
        elif nvidia.cuda < required:
            message = (
                f"got driver {nvidia.driver} with CUDA {_dotted(nvidia.cuda)}, expected CUDA {_dotted(required)} or "
                f"newer for the {name}'s image"
            )
            fix = f"update the driver to one with CUDA {_dotted(required)}, or build with an older CUDA_BASE"
            if nvidia.cuda[0] == required[0]:
                return warn(f"{message}; kernels that are compiled at run time will fail", fix)
            return fail(message, fix)
    supported = f"driver {nvidia.driver} supports CUDA {_dotted(nvidia.cuda)}"
    if unlabelled:
        services = " and ".join(unlabelled)
        return warn(f"{supported}; the image of {services} does not state its CUDA version in CUDA_VERSION")
    return ok(f"{supported}, which is not older than the images'")


def gpu_ids(facts: MachineFacts, service: str) -> tuple[str, ...]:
    """Return the devices of a service as they are written. A count of 2 becomes `0` and `1`."""
    return tuple(device for request in known(facts.stack).services[service].devices for device in _ids(facts, request))


def gpus_of(facts: MachineFacts, service: str) -> list[Gpu]:
    """Return the GPUs of a service as nvidia-smi describes them.

    Raises:
        NotKnown: nvidia-smi lists none of them (they do not exist, or are MIG slices).
    """
    requested = {identity(device, uuids(facts)) for device in gpu_ids(facts, service)}
    found = [gpu for gpu in known(facts.nvidia).gpus if gpu.uuid.lower() in requested]
    if requested and not found:
        raise NotKnown(f"nvidia-smi lists none of the {service}'s GPUs")
    return found


def uuids(facts: MachineFacts) -> dict[str, str]:
    """Return index → UUID; empty if nvidia-smi is not available."""
    return {str(gpu.index): gpu.uuid for gpu in facts.nvidia.gpus} if isinstance(facts.nvidia, Nvidia) else {}


def _ids(facts: MachineFacts, request: Devices) -> tuple[str, ...]:
    requests_all = request.count == -1 or any(identity(device) == "all" for device in request.ids)
    if request.count is None and not requests_all:
        return request.ids
    number = len(known(facts.nvidia).gpus) if requests_all else request.count
    return tuple(str(index) for index in range(number or 0))


def _offered(facts: MachineFacts, request: Devices) -> set[str]:
    if request.driver == "cdi":
        return set(known(known(facts.engine).cdi_devices))
    return {name for gpu in known(facts.nvidia).gpus for name in (str(gpu.index), gpu.uuid)}


def _cuda(image: Image) -> tuple[int, int] | None:
    """Return the CUDA version that an image was built with. `NVIDIA_REQUIRE_CUDA` reads `cuda>=12.8 brand=…`."""
    text = f"{image.env.get('CUDA_VERSION', '')} {image.env.get('NVIDIA_REQUIRE_CUDA', '')}"
    found = re.match(r"\s*(?:cuda>=)?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
