"""Requests and answers of the wire contract.

Prompts are token ids, and completions are token ids with logprobs. Text never crosses the wire.

Shapes: P prompts per request, G completions per prompt (`Sampling.n`), T tokens per completion.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import ErrorBody
from .version import Version

PROTOCOL_VERSION = 2
"""Newest version of the wire contract that this release speaks. `GET /info` agrees on one.

Version 2 added `Prompt.session`, `RolloutRequest.heartbeat_s` with `RolloutLine.progress`, and the parameters of
`GET /weights`. Requests of version 1 get the same answers as before.
"""
OLDEST_PROTOCOL_VERSION = 1
"""Oldest version of the wire contract that this release speaks."""

Kind = Literal["full", "lora"]
"""Kind of a version. `full`: all tensors of the model. `lora`: an adapter for the base weights, in peft's files."""

TokenId = Annotated[int, Field(ge=0)]
"""Index of a token in the model's vocabulary."""
Logprob = Annotated[float, Field(allow_inf_nan=False)]
"""Natural logarithm of a probability. It is always finite: a token with probability 0 is never sampled."""


class Message(BaseModel):
    """Base of all messages.

    Unknown keys are refused, so that neither a typo nor a field of a newer release is silently ignored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Sampling(Message):
    """How to sample completions.

    Names and meanings are vLLM's. The defaults sample from the policy itself, without any filter.
    """

    n: int = Field(1, ge=1)
    """Completions per prompt (G)."""
    max_tokens: int = Field(ge=1)
    """Maximum length of a completion, in tokens."""
    temperature: float = Field(1.0, ge=0.0)
    """Sampling temperature. 0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Keep the most probable tokens whose probabilities add up to this value. 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Keep this many of the most probable tokens. 0 keeps the complete vocabulary."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Drop tokens whose probability is below this fraction of the most probable token's. 0 keeps all."""
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Values above 1 make tokens less likely that have already appeared in the prompt or completion."""
    stop_token_ids: tuple[TokenId, ...] = ()
    """Tokens that end a completion, in addition to the model's end-of-sequence tokens. The stop token is included as
    the completion's last token."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token."""


class Prompt(Message):
    """One tokenized prompt."""

    token_ids: tuple[TokenId, ...] = Field(min_length=1)
    """Tokens of the prompt, chat template included."""
    seed: int | None = Field(None, ge=0, lt=2**62)
    """Makes the completions of this prompt repeatable, if the engine supports seeds. Completion i of G uses
    `seed + i`."""
    session: str | None = Field(None, min_length=1, max_length=200)
    """Name of the episode that this prompt belongs to. A client sends the prompts of one session to the same replica,
    whose KV cache has their common beginning. The engine does not use it. Since protocol 2."""


class RolloutRequest(Message):
    """Body of `POST /rollouts`: sample G completions for each of P prompts.

    The answer is a stream of NDJSON: one `RolloutLine` per prompt, in the order in which the prompts finish.
    """

    prompts: tuple[Prompt, ...] = Field(min_length=1)
    """The P prompts."""
    sampling: Sampling
    """How to sample. It applies to all prompts."""
    min_version: Version | None = None
    """Oldest policy version that may answer. A generator with an older version answers `stale_policy`."""
    heartbeat_s: float | None = Field(None, ge=0.1)
    """Send a line with `progress` whenever no group has finished for this time, in seconds. None: never. Since
    protocol 2."""


class VersionSpan(Message):
    """Consecutive tokens of a completion that were sampled from the same policy version."""

    version: Version
    """The policy version."""
    tokens: int = Field(ge=0)
    """Number of tokens."""


class Completion(Message):
    """One sampled completion of T tokens."""

    token_ids: tuple[TokenId, ...]
    """[T] The sampled tokens."""
    logprobs: tuple[Logprob, ...]
    """[T] Logprob of each token under the distribution that it was sampled from, after temperature, top-p and the other
    filters."""
    finish_reason: Literal["stop", "length", "abort"]
    """`stop`: a stop token was sampled. `length`: the completion has `max_tokens` tokens. `abort`: a switch of the
    weights ended it early."""
    versions: tuple[VersionSpan, ...]
    """Policy version of every token: spans in order that cover all T tokens. There is more than one span only if the
    weights were switched while the completion was running."""

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
    """The G completions."""


class Progress(Message):
    """A heartbeat: how far a request has come."""

    tokens: int = Field(ge=0)
    """Tokens that have been sampled so far, for all prompts and completions of the request together. If the number
    stays the same, the engine hangs or the request waits for its turn."""


class RolloutLine(Message):
    """One line of the NDJSON answer to `POST /rollouts`. One of `group`, `progress` and `error` is set."""

    group: Group | None = None
    """A finished group."""
    progress: Progress | None = None
    """A heartbeat. Only requests with `heartbeat_s` get one."""
    error: ErrorBody | None = None
    """The error that ended the stream early. No further line follows."""


class SwitchMode(StrEnum):
    """What happens to running requests when the weights are switched."""

    DRAIN = "drain"
    """They finish on the old weights. The switch waits for them."""
    IN_FLIGHT = "in_flight"
    """They pause and continue with the new weights. The spans of a completion say which token has which version."""
    ABORT = "abort"
    """They end at once with `finish_reason: abort` and the tokens that they have."""


class SetWeights(Message):
    """Body of `PUT /weights/{version}`: serve that version.

    It points to files on the shared volume. It never contains tensors.
    """

    manifest_digest: str
    """xxh3-128 digest of the manifest, in hexadecimal. It detects another run's version and an outdated view of a
    network file system."""
    mode: SwitchMode = SwitchMode.DRAIN
    """What happens to running requests."""


class AwaitedWeights(Message):
    """Parameters of `GET /weights`: answer when a version serves. Without them the answer comes at once."""

    at_least: str | None = None
    """Oldest version that may be in the answer, such as `42.1`. None: any. Since protocol 2."""
    wait_s: float = Field(0.0, ge=0.0, le=600.0)
    """How long to wait for it, in seconds. After that the answer is the error `stale_policy`. Since protocol 2."""


class SwitchTimings(Message):
    """How long each part of a switch took, in seconds."""

    verify_s: float
    """Waiting for the files and verifying them, in seconds. Requests are still served meanwhile."""
    visible_s: float = Field(0.0, exclude=True)
    """The part of `verify_s` until the version was visible on the generator's side of the volume. It is not in the
    body, because earlier releases refuse unknown keys, but in the header `Server-Timing`."""
    pause_s: float
    """Pausing the engine, in seconds. With `drain` this includes waiting for running requests."""
    load_s: float
    """Loading the weights into the engine, in seconds."""
    total_s: float
    """The complete switch, in seconds."""

    @property
    def header(self) -> str:
        """The value of the header `Server-Timing`."""
        return f"visible;dur={1000 * self.visible_s:.3f}"

    def with_header(self, header: str) -> SwitchTimings:
        """Add what the header `Server-Timing` says. It is empty in the answer of an earlier release."""
        found = re.search(r"\bvisible;dur=([0-9.]+)", header)
        return self.model_copy(update={"visible_s": float(found[1]) / 1000}) if found else self


class ServedWeights(Message):
    """Answer to `GET /weights`, and to `PUT /weights/{version}` as soon as that version is served."""

    version: Version
    """The version that is served."""
    manifest_digest: str | None
    """Digest of its manifest. None for the base weights."""
    timings: SwitchTimings | None = None
    """Timings of the switch. None if the version was already served, and in the answer to `GET /weights`."""


class ModelFingerprint(Message):
    """Digests of a model, which must agree between trainer and generator. None if a side cannot compute one."""

    config: str | None = None
    """Digest of `config.json`, without keys that do not change the model."""
    tokenizer: str | None = None
    """Digest of `tokenizer.json`."""
    parameters: str | None = None
    """Digest of the parameter table, name → shape."""


class Info(Message):
    """Answer to `GET /info`: what this generator is and what it serves."""

    protocol: int = PROTOCOL_VERSION
    """Version of the wire contract that both sides speak. The client names its newest one, as in
    `GET /info?protocol=2`; without it the answer is 1."""
    generator_id: str
    """Name of this replica in leases and logs."""
    engine: str
    """`vllm` or `mock`."""
    engine_version: str
    """Version of the engine."""
    model: str
    """`shared.model` of this generator: a directory or an id on the Hugging Face Hub."""
    fingerprint: ModelFingerprint
    """Fingerprint of the model."""
    version: Version
    """The policy version that is served."""
    devices: tuple[str, ...]
    """UUIDs of the accelerators, or `cpu:<n>` for each CPU core that the generator may use."""
    world_size: int
    """Number of the engine's ranks."""
    max_model_len: int
    """Maximum length of prompt and completion together, in tokens."""
    max_num_seqs: int
    """Maximum number of completions that the engine decodes at the same time."""
    dtype: str | None = None
    """Data type that the engine computes in, such as `bfloat16`. None if its logprobs do not come from a model, as with
    the mock."""
    kinds: tuple[Kind, ...] = ("full", "lora")
    """Kinds of versions that this generator can serve."""
    max_lora_rank: int | None = None
    """Largest rank of an adapter. None: no limit."""
    lora_heads: tuple[str, ...] | None = None
    """Names of the output embeddings that an adapter may change, such as `lm_head`. None: no restriction."""


class Parameters(Message):
    """Answer to `GET /parameters`: the parameter table. `ModelFingerprint.parameters` is its digest."""

    shapes: dict[str, tuple[int, ...]]
    """Name in a Hugging Face checkpoint → shape. Empty if the engine does not know it."""


class Readiness(Message):
    """Answer to `GET /readyz`, with status 200 or 503."""

    ready: bool
    """True if the generator answers rollout requests."""
    reason: str
    """Why it is not ready, or which version it serves."""
