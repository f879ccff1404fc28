"""What a generator needs of an inference engine. Token ids in, token ids and logprobs out: no HTTP and no text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from tandem_protocol.messages import Group, Kind, ModelFingerprint, RolloutRequest, SwitchMode
from tandem_protocol.version import Version


class EngineFacts(NamedTuple):
    """What does not change while an engine lives."""

    engine: str
    engine_version: str
    devices: tuple[str, ...]
    """UUIDs of accelerators, or `cpu:<n>` a core."""
    world_size: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    base_shards: tuple[Path, ...]
    """Safetensors of the base weights, to load back if the first switch fails; may be empty."""
    shapes: Mapping[str, tuple[int, ...]]
    """Parameter table under Hugging Face names, tied copies left out; empty where the engine cannot tell."""
    fingerprint: ModelFingerprint
    kinds: frozenset[Kind] = frozenset({"full"})
    """What versions it can load."""
    max_lora_rank: int = 0
    dtype: str | None = None
    """Of the arithmetic; None if the logprobs are not those of a model."""
    layers: Mapping[str, tuple[int, ...]] = {}
    """Parameter table under the names that the model's own modules have, which an adapter's tensors begin with."""
    lora_heads: tuple[str, ...] | None = None
    """Names of the output embeddings that an adapter may change; None: any."""


class Engine(Protocol):
    """An engine that serves one policy at a time.

    `pause`, `load_weights` and `resume` are called in that order and never concurrently: weight_switcher.py ensures it.
    `generate` may be called at any time and waits while the engine is paused.
    """

    facts: EngineFacts

    async def start(self) -> None:
        """Make `facts` available and be able to generate."""
        ...

    def generate(self, request: RolloutRequest) -> AsyncGenerator[Group, None]:
        """Yield each group when its last completion is finished. Closing the iterator ends its running requests.

        Raises:
            EngineFailed: the engine died or broke off.
        """
        ...

    async def pause(self, mode: SwitchMode) -> None:
        """Stop scheduling. Afterwards no running request holds anything that was computed with the old weights."""
        ...

    async def load_weights(self, version: Version, files: Sequence[Path]) -> None:
        """Copy the tensors of `files` (verified safetensors) into the model and stamp later tokens with `version`.

        With an adapter's configuration among them, they are an adapter, which takes the place of the last one.

        Raises:
            Exception: loading failed; which weights the model then holds is undefined until a later call succeeds.
        """
        ...

    async def resume(self) -> None:
        """Go on scheduling."""
        ...

    async def check(self) -> None:
        """Prove that the engine still computes (one token). Raises whatever is wrong; hangs if the engine does."""
        ...

    async def close(self) -> None:
        """End the engine and all of its processes."""
        ...
