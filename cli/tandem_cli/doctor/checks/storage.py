"""Volumes: are they large enough, do memory and disk suffice, and can the services' users use them?"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..compose import parse_size
from ..facts import GENERATOR, SERVICES, TRAINER, ComposeService, Image, MachineFacts, Model, Mount, Volume
from ..finding import Finding, fail, gib, ok, warn
from ..unknown import Unknown, known
from .memory import on_host_bytes, optional_bytes

MOMENTS = 2
"""AdamW keeps two values per parameter."""


def weights(facts: MachineFacts) -> Finding:
    """Check that the tmpfs of the weight store has room for publish.keep + 2 versions.

    Those are the versions to keep, one that a generator still loads, and the next one. With P parameters, a version
    takes P × 2 bytes in bfloat16 and P × 4 in float32 (trainer.learner.dtype).
    """
    volume = _weights_volume(facts)
    if volume.options is None:
        return ok(f"the volume {volume.name} is on disk")
    configured = tmpfs_bytes(volume, volume.options, facts)
    if isinstance(configured, Unknown):
        return fail(configured.message, "set TANDEM_WEIGHTS_SIZE to a number with k, m or g, such as 1g")
    size = configured if volume.created is None else known(tmpfs_bytes(volume, volume.created, facts))
    config = known(facts.settings).trainer
    width = 4 if config.learner.dtype == "float32" else 2
    version = known(facts.model).parameters * width
    versions = config.publish.keep + 2
    need = versions * version
    room = gib(size)
    if size != configured:
        room += f" ({volume.name} was created with this size; {gib(configured)} is configured now)"
    arithmetic = f"{versions} versions × {gib(version)} = {gib(need)}"
    if need > size:
        fix = f"set TANDEM_WEIGHTS_SIZE={math.ceil(need / (1 << 30))}g, then {_recreate(volume)}"
        return fail(f"got {room}, expected at least {arithmetic}", fix)
    message = f"needs {arithmetic} of {room}"
    return ok(message) if size == configured else warn(message, _recreate(volume))


def memory(facts: MachineFacts) -> Finding:
    """Check that the host's memory suffices when tmpfs volumes, /dev/shm and the services are full."""
    stack = known(facts.stack)
    total = known(facts.engine).memory_bytes
    parts = {
        "tmpfs": sum(known(tmpfs_bytes(v, v.options, facts)) for v in stack.volumes.values() if v.options is not None),
        "shm": sum(stack.services[name].shm_bytes for name in SERVICES),
    }
    if isinstance(facts.model, Model) and (services := on_host_bytes(facts)):
        parts["services"] = services
    need = sum(parts.values())
    arithmetic = " + ".join(f"{gib(size)} {name}" for name, size in parts.items()) + f" = {gib(need)}"
    if need > total:
        return fail(
            f"got {gib(total)}, expected at least {arithmetic}",
            "set a smaller TANDEM_WEIGHTS_SIZE, TANDEM_SHM_SIZE or VLLM_CPU_KVCACHE_SPACE "
            "(docs/deploy/containers.md), or use a host with more memory",
        )
    message = f"may need {arithmetic} of {gib(total)}"
    if isinstance(facts.model, Model) and (more := optional_bytes(facts)):
        message += f" (and {gib(more)} for deltas; without them, versions are published in full)"
    if not isinstance(facts.available_bytes, Unknown) and need > facts.available_bytes:
        return warn(
            f"{message}, of which {gib(facts.available_bytes)} are free now", "end other programs that use memory"
        )
    return ok(message)


def disk(facts: MachineFacts) -> Finding:
    """Check the disk for checkpoint.keep + 1 checkpoints.

    Each holds P × 4 bytes for the model, and P × 4 for each of AdamW's two moments.
    """
    number = known(facts.settings).trainer.checkpoint.keep + 1
    checkpoint = known(facts.model).parameters * 4 * (1 + MOMENTS)
    need = number * checkpoint
    free = known(facts.disk_free_bytes)
    arithmetic = f"{number} checkpoints × {gib(checkpoint)} = {gib(need)}"
    if need > free:
        return fail(
            f"got {gib(free)} free, expected at least {arithmetic}",
            "run `docker system prune`, set a smaller trainer.checkpoint.keep, or give Docker a larger disk",
        )
    return ok(f"needs {arithmetic} of {gib(free)} free")


def access(facts: MachineFacts) -> Finding:
    """Check that the trainer's user can write the weights and the generator's can read them.

    The configuration is checked first. Then containers try both.
    """
    stack = known(facts.stack)
    written = stack.services[TRAINER].mount("/weights")
    read = stack.services[GENERATOR].mount("/weights")
    if written is None or read is None or written.read_only or written.source != read.source:
        return fail(
            f"got /weights from {_describe(written)} in the trainer and from {_describe(read)} in the generator, "
            "expected one volume in both, which the trainer can write",
            "use the services' volumes of compose.yaml; compose appends the lists of an override unless they have "
            "`!override`",
        )
    if wrong := _wrong_users(facts):
        return fail(
            wrong, "set uid=, gid= and mode= in driver_opts of the weights volume to those of the services' user"
        )
    if isinstance(facts.access, Unknown):
        return ok(f"the configuration allows it; not tried: {facts.access.reason}")
    if error := facts.access.trainer_writes or facts.access.generator_reads:
        who = "trainer cannot write" if facts.access.trainer_writes else "generator cannot read"
        volume = _weights_volume(facts)
        return fail(f"the {who} the weights: {error}", f"use the options of compose.yaml, then {_recreate(volume)}")
    return ok("tried: the trainer can write, the generator can read")


def tmpfs_bytes(volume: Volume, options: Mapping[str, str], facts: MachineFacts) -> int | Unknown:
    """Return the size of a tmpfs: `size=1g` or `size=50%` of memory. The kernel's default is 50%."""
    size = options.get("size", "50%")
    total = known(facts.engine).memory_bytes
    try:
        if size.endswith("%"):
            return int(float(size[:-1]) / 100 * total)
        return parse_size(size)
    except ValueError:
        return Unknown(
            f"got {size!r} as the size of the volume {volume.name}, expected a number with k, m or g, or a percentage"
        )


def _recreate(volume: Volume) -> str:
    command = f"docker compose down && docker volume rm {volume.name}"
    return f"run `{command}`, since a volume keeps the options that it was created with"


def _describe(mount: Mount | None) -> str:
    if mount is None:
        return "no volume"
    return f"{mount.source} (read-only)" if mount.read_only else mount.source


def _weights_volume(facts: MachineFacts) -> Volume:
    stack = known(facts.stack)
    mount = stack.services[TRAINER].mount("/weights")
    source = mount.source if mount else ""
    return stack.volumes.get(source, Volume(source))


def _wrong_users(facts: MachineFacts) -> str:
    """Return a message if a service runs as a user who does not own the weights tmpfs, or an empty string."""
    owner = (_weights_volume(facts).options or {}).get("uid")
    services = known(facts.stack).services
    users = {name: _uid(services[name], facts.images.get(name)) for name in SERVICES}
    others = [f"user {user} for the {name}" for name, user in users.items() if owner and user not in (None, owner, "0")]
    if not others:
        return ""
    return f"got {' and '.join(others)}, expected {owner}, the owner of the weights volume"


def _uid(service: ComposeService, image: Image | Unknown | None) -> str | None:
    user = service.user or (image.user if isinstance(image, Image) else "")
    return user.partition(":")[0] or None
