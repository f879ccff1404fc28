"""Check once, before the first step, that the generators fit the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem_protocol.config.learning import LoraConfig
from tandem_protocol.device_sets import shared_devices
from tandem_protocol.fingerprint import differences
from tandem_protocol.messages import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Info, ModelFingerprint
from tandem_protocol.parameters import Shapes, describe_differences

from .errors import UserError

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for `max_lora_rank`."""


def check_generators(
    infos: Sequence[Info],
    urls: Sequence[str],
    *,
    ours: ModelFingerprint,
    model: str,
    max_completion_length: int,
    accelerators: Sequence[str],
    shapes: Shapes | None = None,
    tables: Mapping[str, Shapes] | None = None,
    lora: LoraConfig | None = None,
    adapted_head: str | None = None,
) -> int:
    """Check the generators, and return the length in tokens that all of them support.

    Args:
        ours: the fingerprint of the trainer's model.
        accelerators: UUIDs of the GPUs of all trainer ranks. CPU cores have no unique names, so this check cannot
            find services that share them.
        shapes: the trainer's parameter table.
        tables: URL → parameter table, for the replicas whose table differs.
        lora: the adapter to train, or None.
        adapted_head: name of the output embedding, if the adapter changes it.

    Raises:
        UserError: a replica speaks another protocol, holds another model, does not support the length of a completion,
            uses a GPU of the trainer, or cannot serve what this run publishes.
    """
    for info, url in zip(infos, urls, strict=True):
        where = f"generator {info.generator_id} at {url}"
        if not OLDEST_PROTOCOL_VERSION <= info.protocol <= PROTOCOL_VERSION:
            raise UserError(
                f"{where} speaks protocol {info.protocol}, expected {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}. "
                "Fix: run the same release of Tandem on both sides."
            )
        if differing := differences(ours, info.fingerprint):
            table = (tables or {}).get(url)
            details = describe_differences(shapes or {}, table) if table else ""
            if details:
                details = f"; {details}"
            raise UserError(
                f"{where} holds another model than the trainer: got {info.model!r}, expected {model!r}. They differ in "
                f"{', '.join(differing)}{details}. Fix: set the same shared.model and shared.revision for both."
            )
        if info.max_model_len <= max_completion_length:
            raise UserError(
                f"{where} supports {info.max_model_len} tokens for prompt and completion together, expected more than "
                f"trainer.rollout.max_completion_length, which is {max_completion_length}. Fix: lower it, or raise "
                "generator.max_model_len."
            )
        if shared := shared_devices(accelerators, info.devices):
            raise UserError(
                f"{where} computes on {', '.join(info.devices)} and the trainer on {', '.join(accelerators)}. Both use "
                f"{', '.join(shared)}, expected disjoint sets. Fix: give each its own GPUs, with `tandem gpus "
                "--generator 0-3 --trainer 4-7` under compose, or with CUDA_VISIBLE_DEVICES for each process."
            )
        _check_kind(info, where, lora, adapted_head)
    ids = [info.generator_id for info in infos]
    if len(set(ids)) < len(ids):
        raise UserError(
            f"shared.generators {list(urls)} have the names {ids}, expected a different name for each. Fix: list every "
            "replica once, and give each its own generator.generator_id."
        )
    return min(info.max_model_len for info in infos)


def _check_kind(info: Info, where: str, lora: LoraConfig | None, adapted_head: str | None) -> None:
    """Check that a replica can serve what this run publishes: all weights, or an adapter."""
    kind = "lora" if lora else "full"
    if kind not in info.kinds:
        fix = "set trainer.lora, or remove enable_lora from generator.vllm"
        if lora:
            fix = f"set generator.vllm: {{enable_lora: true, max_lora_rank: {_served_rank(lora.r)}}}"
        raise UserError(
            f"{where} serves versions of kind {', '.join(info.kinds)}, but this run publishes {kind}. Fix: {fix}, and "
            "restart the generator."
        )
    if lora and info.max_lora_rank is not None and lora.r > info.max_lora_rank:
        raise UserError(
            f"{where} serves adapters up to rank {info.max_lora_rank}, but trainer.lora.r is {lora.r}. Fix: raise "
            "generator.vllm.max_lora_rank and restart the generator, or lower trainer.lora.r."
        )
    if adapted_head and info.lora_heads is not None and adapted_head not in info.lora_heads:
        raise UserError(
            f"{where} does not support an adapter for the output embedding {adapted_head} of this model. Fix: remove "
            f"{adapted_head} from trainer.lora.target_modules."
        )


def _served_rank(rank: int) -> int:
    """Return the smallest rank of vLLM that is at least `rank`."""
    return next((served for served in _VLLM_RANKS if served >= rank), _VLLM_RANKS[-1])
