"""The images, and the ports that are published."""

from __future__ import annotations

from ..facts import SERVICES, Facts, Image
from ..finding import Finding, fail, ok, warn
from ..unknown import Unknown, known

REVISION, VERSION = "org.opencontainers.image.revision", "org.opencontainers.image.version"
UNTOLD = ("", "unknown")


def present(facts: Facts) -> Finding:
    stack = known(facts.stack)
    known(facts.engine)
    missing = {stack.services[name].image: name for name in SERVICES if isinstance(facts.images.get(name), Unknown)}
    if not missing:
        return ok(", ".join(stack.services[name].image for name in SERVICES))
    names = ", ".join(missing)
    if all(stack.services[name].is_built for name in missing.values()):
        return warn(f"{names}: not built yet; the first `docker compose up` does", "docker compose build")
    return fail(f"{names}: not there, and the configuration does not say how to build it", "docker compose pull")


def one_version(facts: Facts) -> Finding:
    """Both services come from one state of the code, as their labels tell."""
    generator, trainer = (_labels(facts, name) for name in SERVICES)
    if generator != trainer:
        return fail(
            f"the images differ: generator {_describe(generator)}, trainer {_describe(trainer)}",
            "docker compose build, or pull both at one version",
        )
    if all(value in UNTOLD for value in generator):
        return warn(
            "the images do not tell which state of the code they are of",
            "TANDEM_REVISION=$(git rev-parse HEAD) docker compose build",
        )
    return ok(f"both {_describe(generator)}")


def _labels(facts: Facts, service: str) -> tuple[str, str]:
    known(facts.engine)
    image: Image = known(facts.images.get(service, Unknown(f"the {service}'s image is not known")))
    return image.labels.get(VERSION, ""), image.labels.get(REVISION, "")


def _describe(labels: tuple[str, str]) -> str:
    return " ".join(label for label in labels if label) or "without labels"


def ports(facts: Facts) -> Finding:
    published = [port for service in known(facts.stack).services.values() for port in service.ports]
    if not published:
        return ok("nothing is published on the host")
    known(facts.engine)
    if taken := [str(port.number) for port in published if port.state == "taken"]:
        return fail(
            f"port {', '.join(taken)}: another process listens there",
            f"end it (`ss -ltnp sport = :{taken[0]}` names it), or publish another port",
        )
    if unknown := [port.state.reason for port in published if isinstance(port.state, Unknown)]:
        return warn("; ".join(unknown))
    return ok(
        ", ".join(f"{port.number} {'is this stack’s' if port.state == 'own' else 'is free'}" for port in published)
    )
