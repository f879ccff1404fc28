"""The checks: pure functions from facts to a finding. `CHECKS` lists them in the order in which they are printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..facts import MachineFacts, Stack
from ..finding import Finding, warn
from ..unknown import NotKnown
from . import cpus_and_gpus, docker, images, memory, project_config, storage

CHECKS: dict[str, Callable[[MachineFacts], Finding]] = {
    "engine": docker.version,
    "compose": docker.compose,
    "configuration": docker.configuration,
    "project": project_config.configuration,
    "images": images.present,
    "image versions": images.one_version,
    "CPU sets": cpus_and_gpus.cpus,
    "GPU access": cpus_and_gpus.access,
    "GPU ids": cpus_and_gpus.exist,
    "GPU sets": cpus_and_gpus.disjoint,
    "GPU use": cpus_and_gpus.unused,
    "GPU driver": cpus_and_gpus.driver,
    "processes": project_config.processes,
    "model": project_config.model,
    "generator fits": memory.generator,
    "trainer fits": memory.trainer,
    "weight store": storage.weights,
    "host memory": storage.memory,
    "disk": storage.disk,
    "weights access": storage.access,
    "ports": images.ports,
}

GPU_CHECKS = frozenset({"GPU ids", "GPU sets", "GPU use", "GPU driver"})
"""Checks that are left out when no service requests a GPU."""


def examine(facts: MachineFacts) -> list[Finding]:
    """Return one finding per check. A check whose facts could not be gathered gives a warning."""
    without_gpus = isinstance(facts.stack, Stack) and not facts.stack.uses_gpus
    left_out = GPU_CHECKS if without_gpus else frozenset()
    return [replace(_judge(check, facts), name=name) for name, check in CHECKS.items() if name not in left_out]


def _judge(check: Callable[[MachineFacts], Finding], facts: MachineFacts) -> Finding:
    try:
        return check(facts)
    except NotKnown as error:
        return warn(f"not checked: {error}")
