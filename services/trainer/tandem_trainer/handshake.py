"""Whether trainer and generators belong together, asked once before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem_protocol.device_sets import shared_devices
from tandem_protocol.fingerprint import differences
from tandem_protocol.messages import PROTOCOL_VERSION, Info, ModelFingerprint
from tandem_protocol.parameters import Shapes, describe_differences

from .config import LoraConfig
from .errors import UserError

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `max_lora_rank` may be."""


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
    """The length in tokens that every replica can take.

    Args:
        accelerators: UUIDs of those that the trainer's ranks compute on. CPU cores have no name beyond their host, so
            services that share some are not found out here.
        shapes: our parameter table.
        tables: URL → parameter table of the replicas whose table is another.
        lora: the adapter that is trained, if one is.
        adapted_head: name of the output embedding, if the adapter changes it.

    Raises:
        UserError: a replica speaks another protocol, holds another model, is too short for any completion, computes on
            an accelerator of the trainer's, or cannot serve what is trained.
    """
    for info, url in zip(infos, urls, strict=True):
        where = f"generator {info.generator_id} at {url}"
        if info.protocol != PROTOCOL_VERSION:
            raise UserError(
                f"{where} speaks protocol {info.protocol}, expected {PROTOCOL_VERSION}. Run the same release "
                "on both sides."
            )
        if differing := differences(ours, info.fingerprint):
            details = describe_differences(shapes or {}, table) if (table := (tables or {}).get(url)) else ""
            raise UserError(
                f"{where} holds another model than the trainer: {info.model!r} against {model!r}, they differ in "
                f"{', '.join(differing)}{details and '; '}{details}. Fix: give both the same shared.model and "
                "shared.revision."
            )
        if info.max_model_len <= max_completion_length:
            raise UserError(
                f"{where} takes {info.max_model_len} tokens, prompt and completion together, expected more than "
                f"trainer.rollout.max_completion_length {max_completion_length}. Lower that or raise "
                "generator.max_model_len."
            )
        if shared := shared_devices(accelerators, info.devices):
            raise UserError(
                f"{where} computes on {', '.join(info.devices)} and the trainer on {', '.join(accelerators)}, which "
                f"share {', '.join(shared)}, expected disjoint sets. Give each its own: `tandem gpus --generator 0-3 "
                "--trainer 4-7` under compose, or another CUDA_VISIBLE_DEVICES for each process."
            )
        _check_kind(info, where, lora, adapted_head)
    ids = [info.generator_id for info in infos]
    if len(set(ids)) < len(ids):
        raise UserError(
            f"shared.generators {list(urls)} answer as {ids}, expected each replica once, under its own name"
        )
    return min(info.max_model_len for info in infos)


def _check_kind(info: Info, where: str, lora: LoraConfig | None, adapted_head: str | None) -> None:
    """Whether a replica serves what this run publishes: all weights, or an adapter."""
    kind = "lora" if lora else "full"
    if kind not in info.kinds:
        fix = (
            f"set generator.vllm: {{enable_lora: true, max_lora_rank: {_served_rank(lora.r)}}}"
            if lora
            else "set trainer.lora, or leave enable_lora out of generator.vllm"
        )
        raise UserError(
            f"{where} serves versions of kind {', '.join(info.kinds)}; this run publishes {kind}. Fix: {fix}, and "
            "start the generator again."
        )
    if lora and info.max_lora_rank is not None and lora.r > info.max_lora_rank:
        raise UserError(
            f"{where} serves adapters of rank {info.max_lora_rank} at most; trainer.lora.r is {lora.r}. Fix: raise "
            "generator.vllm.max_lora_rank and start the generator again, or lower trainer.lora.r."
        )
    if adapted_head and info.lora_heads is not None and adapted_head not in info.lora_heads:
        raise UserError(
            f"{where} takes no adapter at the output embedding {adapted_head} of this model. Fix: leave {adapted_head} "
            "out of trainer.lora.target_modules."
        )


def _served_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds `rank`."""
    return next((served for served in _VLLM_RANKS if served >= rank), _VLLM_RANKS[-1])
