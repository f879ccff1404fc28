"""The project and its model."""

from __future__ import annotations

from ..facts import TRAINER, MachineFacts, Model
from ..finding import Finding, count, fail, ok, warn
from ..unknown import Refused, Unknown, known


def configuration(facts: MachineFacts) -> Finding:
    """Check that the project's config.yaml can be read."""
    if isinstance(facts.settings, Refused):
        return fail(facts.settings.message, facts.settings.fix)
    settings = known(facts.settings)
    folder = known(facts.stack).project_folder
    return ok(f"{folder}: model {settings.shared.model}, engine {settings.generator.engine}")


def processes(facts: MachineFacts) -> Finding:
    """Check that the trainer's processes get the same number of prompts."""
    number = known(facts.settings).trainer.rollout.num_prompts
    text = known(facts.stack).services[TRAINER].env.get("TANDEM_TRAINER_PROCESSES") or "1"
    if not text.isdecimal() or int(text) < 1 or number % int(text):
        return fail(
            f"got {text} trainer processes for the {number} prompts of trainer.rollout.num_prompts, expected a number "
            f"that divides {number}",
            "set TANDEM_TRAINER_PROCESSES, or the number of GPUs in `tandem gpus --trainer`, or num_prompts",
        )
    return ok(f"{text} of the trainer, for {number} prompts per step")


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
