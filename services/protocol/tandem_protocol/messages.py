"""The wire contract's nouns. Token ids in, token ids and logprobs out; text never crosses this boundary.

Shapes: P prompts a request, G samples a prompt (`Sampling.n`), T tokens a completion.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import ErrorBody
from .version import Version

PROTOCOL_VERSION = 1

Kind = Literal["full", "lora"]
"""What a version is. `full`: all tensors of the model. `lora`: an adapter for the base weights, in peft's files."""

TokenId = Annotated[int, Field(ge=0)]
Logprob = Annotated[float, Field(allow_inf_nan=False)]
"""Finite: JSON knows nothing else, and a token of probability 0 is never sampled."""


class Message(BaseModel):
    """Base of all messages: unknown keys are refused, so that a typo or a newer peer cannot be half understood."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Sampling(Message):
    """How to sample. Names and meanings are vLLM's; the defaults sample from the policy itself."""

    n: int = Field(1, ge=1)
    """Completions a prompt (G)."""
    max_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, ge=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    """0 keeps the whole vocabulary."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0)
    stop_token_ids: tuple[TokenId, ...] = ()
    """Besides the model's own end-of-sequence tokens. The stop token is the completion's last token."""
    ignore_eos: bool = False


class Prompt(Message):
    """One prompt, already tokenized."""

    token_ids: tuple[TokenId, ...] = Field(min_length=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    """Makes the samples of this prompt repeatable on engines that can; sample i of G uses seed + i, in 63 bits."""


class RolloutRequest(Message):
    """`POST /rollouts`: P prompts × G samples. The answer streams one `RolloutLine` a prompt, in order of finishing."""

    prompts: tuple[Prompt, ...] = Field(min_length=1)
    sampling: Sampling
    min_version: Version | None = None
    """The oldest policy that may answer; an older generator answers `stale_policy`."""


class VersionSpan(Message):
    """`tokens` consecutive tokens that were sampled from policy `version`."""

    version: Version
    tokens: int = Field(ge=0)


class Completion(Message):
    """One sampled completion of T tokens."""

    token_ids: tuple[TokenId, ...]
    logprobs: tuple[Logprob, ...]
    """[T]. Of the distribution that was really sampled from: temperature, top-p and the rest applied."""
    finish_reason: Literal["stop", "length", "abort"]
    versions: tuple[VersionSpan, ...]
    """In order, covering all T tokens; more than one only if the weights were switched in flight."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Completion:
        tokens = len(self.token_ids)
        if len(self.logprobs) != tokens or sum(span.tokens for span in self.versions) != tokens:
            raise ValueError(
                f"got {tokens} token ids, {len(self.logprobs)} logprobs and spans of"
                f" {[span.tokens for span in self.versions]} tokens; expected one logprob and one version per token"
            )
        return self


class Group(Message):
    """All G completions of one prompt."""

    prompt_index: int = Field(ge=0)
    """Position of the prompt in the request."""
    completions: tuple[Completion, ...]


class RolloutLine(Message):
    """One line of the NDJSON answer: a finished group, or the error that ended the stream."""

    group: Group | None = None
    error: ErrorBody | None = None


class SwitchMode(StrEnum):
    """What becomes of the requests that run while the weights are switched."""

    DRAIN = "drain"
    """They finish on the old weights first."""
    IN_FLIGHT = "in_flight"
    """They pause and go on with the new weights; their spans say where."""
    ABORT = "abort"
    """They end at once with `finish_reason: abort` and what they have."""


class SetWeights(Message):
    """`PUT /weights/{version}`: serve that version. A pointer into the shared volume, never tensors."""

    manifest_digest: str
    """xxh3-128 of the manifest's bytes, so that a stale view of a network file system is noticed."""
    mode: SwitchMode = SwitchMode.DRAIN


class SwitchTimings(Message):
    """Where a switch spent its time, in seconds."""

    verify_s: float
    pause_s: float
    load_s: float
    total_s: float


class ServedWeights(Message):
    """`GET /weights`, and the answer to `PUT /weights/{version}` once that version serves."""

    version: Version
    manifest_digest: str | None
    """None for the base weights."""
    timings: SwitchTimings | None = None
    """None when nothing had to be done."""


class ModelFingerprint(Message):
    """Digests that must agree between trainer and generator; None where a side cannot tell."""

    config: str | None = None
    tokenizer: str | None = None
    parameters: str | None = None
    """Of the table name → shape, so that another size of the same architecture is noticed."""


class Info(Message):
    """`GET /info`: what this generator is."""

    protocol: int = PROTOCOL_VERSION
    generator_id: str
    engine: str
    engine_version: str
    model: str
    fingerprint: ModelFingerprint
    version: Version
    devices: tuple[str, ...]
    """UUIDs of accelerators, or `cpu:<n>` for each core it may run on."""
    world_size: int
    max_model_len: int
    max_num_seqs: int
    dtype: str | None = None
    """Of the engine's arithmetic, such as `bfloat16`; None if its logprobs are not those of a model (the mock)."""
    kinds: tuple[Kind, ...] = ("full", "lora")
    """Of the versions that it serves."""
    max_lora_rank: int | None = None
    """None: any."""
    lora_heads: tuple[str, ...] | None = None
    """Names of the output embeddings that an adapter may change, such as `lm_head`; None: any."""


class Parameters(Message):
    """`GET /parameters`: the parameter table that `ModelFingerprint.parameters` is the digest of."""

    shapes: dict[str, tuple[int, ...]]
    """Name in a Hugging Face checkpoint → shape; empty where the engine does not know it."""


class Readiness(Message):
    """`GET /readyz`, with status 200 or 503."""

    ready: bool
    reason: str
