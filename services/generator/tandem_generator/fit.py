"""Whether a version is one that this generator's engine can serve."""

from __future__ import annotations

from tandem_protocol.errors import WeightsRefused
from tandem_protocol.fingerprint import differences
from tandem_protocol.manifest import Manifest
from tandem_protocol.parameters import describe_differences

from .engines.base import EngineFacts


def check_model(manifest: Manifest, facts: EngineFacts) -> None:
    """Refuse a version that this engine cannot serve, before its model is touched.

    Raises:
        WeightsRefused: it is of another model, has another parameter table, or is of a kind that is not served here.
    """
    # The parameter table is compared name by name, which tells more than its digest.
    other = [name for name in differences(facts.fingerprint, manifest.fingerprint) if name != "parameters"]
    problems = [f"its {' and '.join(other)} differ from this generator's"] if other else []
    if manifest.kind == "full" and "full" in facts.kinds and facts.shapes:
        problems += filter(None, [describe_differences(manifest.shapes, facts.shapes)])
    if problems:
        raise WeightsRefused(
            f"version {manifest.version} (run {manifest.run!r}) is of another model: {'; '.join(problems)}. Fix: start "
            "both services with the same shared.model and shared.revision."
        )
    _check_kind(manifest, facts)


def _check_kind(manifest: Manifest, facts: EngineFacts) -> None:
    name = f"version {manifest.version} (run {manifest.run!r})"
    if manifest.kind not in facts.kinds:
        raise WeightsRefused(
            f"{name} is of kind {manifest.kind}; this generator serves {', '.join(sorted(facts.kinds))}. With "
            "trainer.lora set generator.vllm: {enable_lora: true, max_lora_rank: …}, without it leave both out; then "
            "start the generator again."
        )
    if manifest.kind == "full":
        return
    if manifest.lora_rank > facts.max_lora_rank:
        raise WeightsRefused(
            f"{name} is an adapter of rank {manifest.lora_rank}; wanted at most {facts.max_lora_rank}. Raise "
            "generator.vllm.max_lora_rank and start the generator again, or lower trainer.lora.r."
        )
    if "parameters" in differences(facts.fingerprint, manifest.fingerprint):
        raise WeightsRefused(
            f"{name} is an adapter for a model with other parameters than this generator's. Start both services with "
            "the same shared.model and revision."
        )
