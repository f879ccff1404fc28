"""The project and its model."""

from __future__ import annotations

from ..facts import Facts, Model
from ..finding import Finding, count, fail, ok, warn
from ..unknown import Refused, Unknown, known


def configuration(facts: Facts) -> Finding:
    if isinstance(facts.settings, Refused):
        return fail(facts.settings.message, facts.settings.fix)
    settings = known(facts.settings)
    folder = known(facts.stack).project_folder
    return ok(f"{folder}: model {settings.shared.model}, engine {settings.generator.engine}")


def model(facts: Facts) -> Finding:
    """It lies where the services find it without a network, or the preflight may fetch it."""
    if isinstance(facts.model, Refused):
        return fail(facts.model.message, facts.model.fix)
    if isinstance(facts.model, Unknown):
        return warn(facts.model.message, facts.model.fix)
    return ok(f"{size(facts.model)} in {facts.model.where}" + ("" if facts.model.is_local else ", to be fetched"))


def size(model: Model) -> str:
    return f"{count(model.parameters)} parameters"
