"""The images, and the published ports."""

from __future__ import annotations

from ..facts import SERVICES, Image, MachineFacts
from ..finding import Finding, fail, ok, warn
from ..unknown import Unknown, known

REVISION, VERSION = "org.opencontainers.image.revision", "org.opencontainers.image.version"
NOT_STATED = ("", "unknown")
"""Values of the labels of an image that was built without TANDEM_REVISION."""


def present(facts: MachineFacts) -> Finding:
    """Check that the images exist, or that compose will build them."""
    stack = known(facts.stack)
    known(facts.engine)
    missing = {stack.services[name].image: name for name in SERVICES if isinstance(facts.images.get(name), Unknown)}
    if not missing:
        return ok(", ".join(stack.services[name].image for name in SERVICES))
    names = ", ".join(missing)
    if all(stack.services[name].is_built for name in missing.values()):
        return warn(f"{names}: not built yet; the first `docker compose up` builds it", "run `docker compose build`")
    return fail(
        f"{names}: this engine does not have it, and the configuration has no `build` section for it",
        "run `docker compose pull`",
    )


def one_version(facts: MachineFacts) -> Finding:
    """Check that both images were built from the same revision of the code, by their labels."""
    generator, trainer = (_labels(facts, name) for name in SERVICES)
    if any(a != b for a, b in zip(generator, trainer, strict=True) if a not in NOT_STATED and b not in NOT_STATED):
        return fail(
            f"got generator {_describe(generator)} and trainer {_describe(trainer)}, expected the same version of both",
            "run `docker compose build`, or pull both images at one version",
        )
    if without := [name for name, (_, rev) in zip(SERVICES, (generator, trainer), strict=True) if rev in NOT_STATED]:
        return warn(
            f"the image of {' and '.join(without)} has no revision label, so the versions cannot be compared",
            "run `TANDEM_REVISION=$(git rev-parse HEAD) docker compose build`",
        )
    return ok(f"both {_describe(generator)}")


def _labels(facts: MachineFacts, service: str) -> tuple[str, str]:
    known(facts.engine)
    image: Image = known(facts.images.get(service, Unknown(f"the {service}'s image is not known")))
    return image.labels.get(VERSION, ""), image.labels.get(REVISION, "")


def _describe(labels: tuple[str, str]) -> str:
    return " ".join(label for label in labels if label) or "without labels"


def ports(facts: MachineFacts) -> Finding:
    """Check that the ports to publish are free, or that this stack already has them."""
    published = [port for service in known(facts.stack).services.values() for port in service.ports]
    if not published:
        return ok("no port is published on the host")
    known(facts.engine)
    if taken := [str(port.number) for port in published if port.state == "taken"]:
        return fail(
            f"got port {', '.join(taken)}, on which another process listens, expected a free port",
            f"end that process (`ss -ltnp sport = :{taken[0]}` shows it), or publish another port",
        )
    if unknown := [port.state.reason for port in published if isinstance(port.state, Unknown)]:
        return warn("; ".join(unknown))
    return ok(
        ", ".join(
            f"{port.number} {'is used by this stack' if port.state == 'own' else 'is free'}" for port in published
        )
    )
