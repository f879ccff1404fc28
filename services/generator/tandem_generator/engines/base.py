"""Interface of an inference engine. It takes and returns token ids. It knows neither HTTP nor text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from tandem_protocol.messages import Group, Kind, ModelFingerprint, RolloutRequest, SwitchMode
from tandem_protocol.version import Version

OnTokens = Callable[[int], object]
"""Called with the number of tokens that have been sampled since the last call."""


def no_count(tokens: int) -> None:
    """Ignore the number of tokens."""


class EngineFacts(NamedTuple):
    """Facts about an engine that do not change while it runs."""

    engine: str
    """Name of the engine, such as `vllm`."""
    engine_version: str
    """Version of the engine."""
    devices: tuple[str, ...]
    """UUIDs of the accelerators, or `cpu:<n>` for each CPU core."""
    world_size: int
    """Number of ranks."""
    max_model_len: int
    """Maximum length of prompt and completion together, in tokens."""
    max_num_seqs: int
    """Maximum number of completions that are decoded at the same time."""
    vocab_size: int
    """Size of the vocabulary. Token ids must be smaller."""
    base_shards: tuple[Path, ...]
    """Safetensors files of the base weights, to load again if the first switch fails. Empty if they have another
    format."""
    shapes: Mapping[str, tuple[int, ...]] | None
    """Parameter table with the names in a checkpoint, without tied copies. None: the engine computes without weights,
    and does not know the table, so any version fits."""
    fingerprint: ModelFingerprint
    """Fingerprint of the model."""
    kinds: frozenset[Kind] = frozenset({"full"})
    """Kinds of versions that the engine can load."""
    max_lora_rank: int = 0
    """Largest rank of an adapter."""
    dtype: str | None = None
    """Data type that the engine computes in. None if the logprobs do not come from a model."""
    layers: Mapping[str, tuple[int, ...]] = {}
    """Parameter table with the names of the model's modules, which an adapter's tensors use."""
    lora_heads: tuple[str, ...] | None = None
    """Names of the output embeddings that an adapter may change. None: no restriction."""
    one_host: bool = True
    """Whether all workers run on this host, and so can read its files."""


class Engine(Protocol):
    """An engine that serves one policy at a time.

    `weight_switcher.py` calls `pause`, `load_weights` and `resume` in that order and never concurrently.
    `generate` may be called at any time. It waits while the engine is paused.
    """

    facts: EngineFacts
    """Available after `start`."""

    async def start(self) -> None:
        """Start the engine. Afterwards `facts` is set and `generate` works."""
        ...

    def generate(self, request: RolloutRequest, on_tokens: OnTokens = no_count) -> AsyncGenerator[Group, None]:
        """Yield each group when its last completion is finished. Closing the iterator aborts the request.

        Args:
            request: What to sample.
            on_tokens: Called while completions are sampled. It need not be called if the request has no `heartbeat_s`.

        Raises:
            EngineFailed: The engine died or ended the request early.
        """
        ...

    async def pause(self, mode: SwitchMode) -> None:
        """Stop decoding. Afterwards no running request may keep a result of the old weights, such as a KV cache."""
        ...

    async def load_weights(self, version: Version, files: Sequence[Path]) -> None:
        """Load a version into the model. Tokens that are sampled later are labelled with `version`.

        Args:
            version: The version.
            files: Its verified safetensors files. If an adapter's configuration is among them, the files are an adapter
                that replaces the previous adapter.

        Raises:
            Exception: Loading failed. The weights of the model are undefined until a later call succeeds.
        """
        ...

    async def resume(self) -> None:
        """Continue decoding."""
        ...

    async def check(self) -> None:
        """Produce one token, to show that the engine works. Raises any error, and hangs if the engine hangs."""
        ...

    async def close(self) -> None:
        """Stop the engine and all its processes."""
        ...
