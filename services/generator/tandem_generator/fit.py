"""Whether a version is one that this generator's engine can serve."""

from __future__ import annotations

from collections.abc import Mapping

from tandem_protocol.errors import WeightsRefused
from tandem_protocol.fingerprint import differences
from tandem_protocol.manifest import Manifest

from .engines.base import EngineFacts


def check_model(manifest: Manifest, facts: EngineFacts) -> None:
    """Refuse a version that this engine cannot serve, before its model is touched.

    Raises:
        WeightsRefused: it is of another model, has another parameter table, or is of a kind that is not served here.
    """
    # The parameter table is compared name by name below, which tells more than its digest.
    if other := [name for name in differences(facts.fingerprint, manifest.fingerprint) if name != "parameters"]:
        raise WeightsRefused(
            f"version {manifest.version} (run {manifest.run!r}) is of another model: its {' and '.join(other)} differ "
            "from this generator's. Start both services with the same shared.model and revision."
        )
    if manifest.kind == "lora" or manifest.kind not in facts.kinds:
        _check_kind(manifest, facts)
        return
    problems = _table_problems(facts.shapes, manifest.shapes) if facts.shapes else []
    if problems:
        raise WeightsRefused(
            f"version {manifest.version} (run {manifest.run!r}) does not fit this generator's model in {len(problems)} "
            f"tensors: {'; '.join(problems[:3])}. Start both services with the same shared.model and revision."
        )


def _check_kind(manifest: Manifest, facts: EngineFacts) -> None:
    name = f"version {manifest.version} (run {manifest.run!r})"
    if manifest.kind not in facts.kinds:
        raise WeightsRefused(
            f"{name} is of kind {manifest.kind}; this generator serves {', '.join(sorted(facts.kinds))}. With "
            "trainer.lora set generator.vllm: {enable_lora: true, max_lora_rank: …}, without it leave both out; then "
            "start the generator again."
        )
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


def _table_problems(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> list[str]:
    missing = [f"{name} is missing" for name in sorted(ours.keys() - theirs.keys())]
    unknown = [f"{name} is unknown" for name in sorted(theirs.keys() - ours.keys())]
    shapes = [
        f"{name} got {theirs[name]}, wanted {ours[name]}"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name]
    ]
    return [*shapes, *missing, *unknown]
