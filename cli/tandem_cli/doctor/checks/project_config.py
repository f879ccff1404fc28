"""The project and its model."""

from __future__ import annotations

from ..facts import MachineFacts, Model
from ..finding import Finding, count, fail, ok, warn
from ..unknown import Refused, Unknown, known


def configuration(facts: MachineFacts) -> Finding:
    """Check that the project's config.yaml can be read."""
    if isinstance(facts.settings, Refused):
        return fail(facts.settings.message, facts.settings.fix)
    settings = known(facts.settings)
    folder = known(facts.stack).project_folder
    return ok(f"{folder}: model {settings.shared.model}, engine {settings.generator.engine}")


def model(facts: MachineFacts) -> Finding:
    """Check that the services find the model without a network, or that the preflight can download it."""
    if isinstance(facts.model, Refused):
        return fail(facts.model.message, facts.model.fix)
    if isinstance(facts.model, Unknown):
        return warn(facts.model.message, facts.model.fix)
    note = "" if facts.model.is_local else ", which the preflight will download"
    return ok(f"{size(facts.model)} in {facts.model.where}{note}")


def size(model: Model) -> str:
    return f"{count(model.parameters)} parameters"
