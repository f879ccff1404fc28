"""Check whether the engine can serve a version, or answer a request."""

from __future__ import annotations

import re
from collections import Counter

from tandem_protocol.errors import BadRequest, WeightsRefused
from tandem_protocol.fingerprint import differences
from tandem_protocol.manifest import Manifest, TensorEntry
from tandem_protocol.messages import RolloutRequest
from tandem_protocol.parameters import describe_differences

from .engines.base import EngineFacts

_ADAPTER_MATRIX = re.compile(r"(?P<prefix>base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


def check_request_fits(request: RolloutRequest, facts: EngineFacts) -> None:
    """Refuse a request that this engine cannot answer.

    Raises:
        BadRequest: A prompt and its completion are too long, or a token is not in the vocabulary.
    """
    longest = max(len(prompt.token_ids) for prompt in request.prompts)
    if longest + request.sampling.max_tokens > facts.max_model_len:
        raise BadRequest(
            f"got a prompt of {longest} tokens and max_tokens {request.sampling.max_tokens}, expected at most "
            f"{facts.max_model_len} together (the model's max_model_len). Fix: shorten one of them."
        )
    largest = max([*request.sampling.stop_token_ids, *(max(prompt.token_ids) for prompt in request.prompts)])
    if largest >= facts.vocab_size:
        raise BadRequest(
            f"got token id {largest}, expected ids below the vocabulary's size {facts.vocab_size}. "
            "Fix: use this model's tokenizer in the trainer."
        )


def check_version_fits(manifest: Manifest, facts: EngineFacts) -> None:
    """Refuse a version that this engine cannot serve, before the engine's model is changed.

    Raises:
        WeightsRefused: The version belongs to another model, has another parameter table, or is of a kind that this
            engine does not serve.
    """
    # Compare the parameters by name instead of by digest, so that the message can list them.
    other = [name for name in differences(facts.fingerprint, manifest.fingerprint) if name != "parameters"]
    problems = []
    if twice := [name for name, number in Counter(t.name for t in manifest.tensors).items() if number > 1]:
        problems.append(f"its files hold {min(twice)} more than once")
    if other:
        verb = "differs" if len(other) == 1 else "differ"
        problems.append(f"its {' and '.join(other)} {verb} from this generator's")
    if manifest.kind == "full" and "full" in facts.kinds and facts.shapes is not None:
        problems += filter(None, [describe_differences(manifest.shapes, facts.shapes)])
    if problems:
        raise WeightsRefused(
            f"version {manifest.version} (run {manifest.run!r}) belongs to another model: {'; '.join(problems)}. Fix: "
            "start both services with the same shared.model and shared.revision."
        )
    _check_kind(manifest, facts)


def _check_kind(manifest: Manifest, facts: EngineFacts) -> None:
    name = f"version {manifest.version} (run {manifest.run!r})"
    if manifest.kind not in facts.kinds:
        raise WeightsRefused(
            f"got {name} of kind {manifest.kind}, expected kind {' or '.join(sorted(facts.kinds))}. Fix: with "
            "trainer.lora, set generator.vllm: {enable_lora: true, max_lora_rank: …}; without it, leave both out. Then "
            "restart the generator."
        )
    if manifest.kind == "full":
        return
    if manifest.lora_rank > facts.max_lora_rank:
        raise WeightsRefused(
            f"{name} is an adapter of rank {manifest.lora_rank}, expected at most {facts.max_lora_rank}. Fix: "
            "raise generator.vllm.max_lora_rank and restart the generator, or lower trainer.lora.r."
        )
    if "parameters" in differences(facts.fingerprint, manifest.fingerprint):
        raise WeightsRefused(
            f"{name} is an adapter for a model with other parameters than this generator's. Fix: start both services "
            "with the same shared.model and shared.revision."
        )
    if problems := [problem for tensor in manifest.tensors if (problem := _adapter_problem(tensor, facts))]:
        raise WeightsRefused(
            f"{name} is an adapter that this generator cannot serve: {'; '.join(problems[:3])}. Fix: remove the layers "
            "of these tensors from trainer.lora.target_modules."
        )


def _adapter_problem(tensor: TensorEntry, facts: EngineFacts) -> str | None:
    """Return why the engine cannot serve one tensor of an adapter. None if it can."""
    match = _ADAPTER_MATRIX.fullmatch(tensor.name)
    if match is None:
        return f"{tensor.name} is not a matrix of a linear layer (….lora_A.weight or ….lora_B.weight)"
    layer = match["layer"]
    is_first = match["side"] == "A"
    if "." not in layer and facts.lora_heads is not None and layer not in facts.lora_heads:
        return f"the output embedding {layer} takes no adapter"
    weight = facts.layers.get(f"{layer}.weight")
    if weight is None:
        # Only names with peft's prefix contain the names of the model's modules.
        return f"the model has no linear layer {layer}" if match["prefix"] and facts.layers else None
    width = tensor.shape[1] if is_first else tensor.shape[0]
    return None if width in weight else f"{tensor.name} has the shape {tensor.shape} for a layer of {weight}"
