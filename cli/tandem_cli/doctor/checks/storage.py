"""Volumes: large enough, within memory and disk, and the services' users can use them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..compose import parse_size
from ..facts import GENERATOR, SERVICES, TRAINER, Facts, Image, Model, Service, Volume
from ..finding import Finding, fail, gib, ok, warn
from ..unknown import Unknown, known
from .memory import on_host_bytes

MOMENTS = 2
"""AdamW keeps two numbers a parameter."""


def weights(facts: Facts) -> Finding:
    """The store's tmpfs holds publish.keep + 2 versions: those kept, one that a generator loads, and the next one.

    A version is P × 2 bytes in bfloat16, P × 4 in float32 (trainer.learner.dtype).
    """
    volume = _weights_volume(facts)
    if volume.options is None:
        return ok(f"the volume {volume.name} is on disk")
    configured = tmpfs_bytes(volume, volume.options, facts)
    if isinstance(configured, Unknown):
        return fail(configured.message, "TANDEM_WEIGHTS_SIZE: a number with k, m or g, such as 1g")
    size = configured if volume.made is None else known(tmpfs_bytes(volume, volume.made, facts))
    config, model = known(facts.settings).trainer, known(facts.model)
    versions, version = config.publish.keep + 2, model.parameters * (4 if config.learner.dtype == "float32" else 2)
    need = versions * version
    message = f"{versions} versions × {gib(version)} = {gib(need)} of {gib(size)}"
    if size != configured:
        message += f", which {volume.name} was made with (now {gib(configured)} is configured)"
    if need > size:
        return fail(message, f"TANDEM_WEIGHTS_SIZE={math.ceil(need / (1 << 30))}g; {_again(volume)}")
    return ok(message) if size == configured else warn(message, _again(volume))


def memory(facts: Facts) -> Finding:
    """What lies in the host's memory when everything is full: tmpfs volumes, /dev/shm, and the services on the CPU."""
    stack, total = known(facts.stack), known(facts.engine).memory_bytes
    parts = {
        "tmpfs": sum(known(tmpfs_bytes(v, v.options, facts)) for v in stack.volumes.values() if v.options is not None),
        "shm": sum(stack.services[name].shm_bytes for name in SERVICES),
    }
    if isinstance(facts.model, Model) and (services := on_host_bytes(facts)):
        parts["services on the CPU"] = services
    need = sum(parts.values())
    message = f"{' + '.join(f'{gib(size)} {of}' for of, size in parts.items())} = {gib(need)} of {gib(total)}"
    fix = (
        "a smaller TANDEM_WEIGHTS_SIZE, TANDEM_SHM_SIZE or VLLM_CPU_KVCACHE_SPACE (docs/deploy/containers.md); "
        "more memory"
    )
    if need > total:
        return fail(message, fix)
    if not isinstance(facts.available_bytes, Unknown) and need > facts.available_bytes:
        return warn(f"{message}, of which {gib(facts.available_bytes)} are free now", "end what else takes memory")
    return ok(message)


def disk(facts: Facts) -> Finding:
    """Room for checkpoint.keep + 1 checkpoints of P × 4 bytes of model and P × 4 of each of AdamW's two moments."""
    config, parameters = known(facts.settings).trainer, known(facts.model).parameters
    checkpoint, number = parameters * 4 * (1 + MOMENTS), config.checkpoint.keep + 1
    need, free = number * checkpoint, known(facts.disk_free_bytes)
    message = f"{number} checkpoints × {gib(checkpoint)} = {gib(need)} of {gib(free)} free"
    if need > free:
        return fail(message, "docker system prune, a smaller trainer.checkpoint.keep, or a larger disk for Docker")
    return ok(message)


def access(facts: Facts) -> Finding:
    """The trainer's user writes the weights and the generator's reads them: by configuration, and by trial."""
    stack = known(facts.stack)
    written, read = (stack.services[name].mount("/weights") for name in (TRAINER, GENERATOR))
    if written is None or read is None or written.read_only or written.source != read.source:
        return fail(
            "the trainer wants a writable volume at /weights, the generator the same one",
            "take the services' volumes from compose.yaml; an override's list is appended unless it says !override",
        )
    if wrong := _strangers(facts):
        return fail(wrong, "uid=, gid= and mode= of the weights volume's driver_opts have to be the services' user's")
    if isinstance(facts.access, Unknown):
        return ok(f"as configured; not tried: {facts.access.reason}")
    if error := facts.access.trainer_writes or facts.access.generator_reads:
        who = "trainer cannot write" if facts.access.trainer_writes else "generator cannot read"
        volume = _weights_volume(facts)
        return fail(f"the {who} the weights: {error}", f"its options as in compose.yaml; {_again(volume)}")
    return ok("tried: the trainer writes, the generator reads")


def tmpfs_bytes(volume: Volume, options: Mapping[str, str], facts: Facts) -> int | Unknown:
    """The size option of a tmpfs: bytes with a suffix or a share of memory; the kernel's default is half of it."""
    size, total = options.get("size", "50%"), known(facts.engine).memory_bytes
    try:
        return int(float(size[:-1]) / 100 * total) if size.endswith("%") else parse_size(size)
    except ValueError:
        return Unknown(f"got {size!r} as the size of the volume {volume.name}")


def _again(volume: Volume) -> str:
    return f"a volume keeps its options until it is made again: docker compose down && docker volume rm {volume.name}"


def _weights_volume(facts: Facts) -> Volume:
    stack = known(facts.stack)
    mount = stack.services[TRAINER].mount("/weights")
    source = mount.source if mount else ""
    return stack.volumes.get(source, Volume(source))


def _strangers(facts: Facts) -> str:
    """Which service's user is not the owner of a weights tmpfs that only its owner may use."""
    owner = (_weights_volume(facts).options or {}).get("uid")
    services = known(facts.stack).services
    users = {name: _uid(services[name], facts.images.get(name)) for name in SERVICES}
    others = [f"{name} is {user}" for name, user in users.items() if owner and user not in (None, owner, "0")]
    return f"the weights volume is user {owner}'s, and the user of the {' and of the '.join(others)}" if others else ""


def _uid(service: Service, image: Image | Unknown | None) -> str | None:
    user = service.user or (image.user if isinstance(image, Image) else "")
    return user.partition(":")[0] or None
