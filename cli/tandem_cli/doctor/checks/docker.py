"""The Docker engine, docker compose, and whether compose accepts the configuration."""

from __future__ import annotations

import re

from ..facts import MachineFacts
from ..finding import Finding, fail, ok
from ..unknown import Unknown

MIN_ENGINE, MIN_COMPOSE = (25, 0), (2, 24)
UPDATE = "update Docker; if your distribution's packages are too old, use Docker's own"


def version(facts: MachineFacts) -> Finding:
    """Check the engine's version: 25.0 introduced CDI devices and the start interval of health checks."""
    if isinstance(facts.engine, Unknown):
        return fail(facts.engine.message, facts.engine.fix)
    return _at_least("Docker engine", facts.engine.version, MIN_ENGINE)


def compose(facts: MachineFacts) -> Finding:
    """Check compose's version: 2.24 introduced `!override`."""
    if isinstance(facts.compose_version, Unknown):
        return fail(facts.compose_version.message, facts.compose_version.fix)
    return _at_least("docker compose", facts.compose_version, MIN_COMPOSE)


def configuration(facts: MachineFacts) -> Finding:
    """Check that compose could merge the configuration."""
    if isinstance(facts.stack, Unknown):
        return fail(facts.stack.message, facts.stack.fix)
    return ok(f"project {facts.stack.name}: services {', '.join(facts.stack.services)}")


def _at_least(what: str, got: str, minimum: tuple[int, int]) -> Finding:
    numbers = tuple(int(number) for number in re.findall(r"\d+", got)[:2])
    text = ".".join(str(number) for number in minimum)
    if numbers < minimum:
        return fail(f"got {what} {got}, expected {text} or newer", UPDATE)
    return ok(f"{what} {got} ({text} or newer is needed)")
