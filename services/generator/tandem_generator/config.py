"""The generator's options: those that `trl vllm-serve` documents, under the same names, and a few of our own."""

from __future__ import annotations

import socket
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from tandem_protocol.config import Section, SharedConfig

OptionName = Annotated[str, AfterValidator(lambda name: name.lower().replace("-", "_"))]
"""`max-num-seqs` and `MAX_NUM_SEQS` are the option `max_num_seqs`."""


class FaultsConfig(Section):
    """Faults of the mock engine, for testing a trainer against them. Rates are probabilities a request."""

    latency_s: float = Field(0.0, ge=0.0)
    """Added before each group."""
    token_latency_s: float = Field(0.0, ge=0.0)
    """Added before each token; only then can a switch fall into the middle of a completion."""
    error_rate: float = Field(0.0, ge=0.0, le=1.0)
    """The stream ends in an `engine_failed` line."""
    drop_rate: float = Field(0.0, ge=0.0, le=1.0)
    """The connection breaks in the middle of the stream."""
    stale: bool = False
    """Keeps labelling tokens with the first version it served, and says it serves the newest."""
    load_failures: int = Field(0, ge=0)
    """So many loads of weights fail half-way."""


class MockConfig(Section):
    """The mock engine."""

    vocab_size: int | None = Field(None, ge=2)
    """None: what the model's config.json says, or 256 without one."""
    faults: FaultsConfig = FaultsConfig()


class GeneratorConfig(Section):
    """Section `generator`. The options up to `enforce_eager` are those of `trl vllm-serve`."""

    engine: Literal["vllm", "mock"] = "vllm"
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    tensor_parallel_size: int = Field(1, ge=1)
    data_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0.0, le=1.0)
    dtype: str = "auto"
    max_model_len: int | None = Field(None, ge=1)
    enable_prefix_caching: bool | None = None
    enforce_eager: bool | None = None
    generator_id: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """Name of this replica in leases and logs; None: host name and port."""
    visible_timeout_s: float = Field(60.0, gt=0.0)
    """How long a published version may take to appear on this side of the shared volume."""
    switch_timeout_s: float = Field(300.0, gt=0.0)
    """How long running requests may hold up a switch, and how long the load itself may take."""
    canary_every_s: float = Field(15.0, gt=0.0)
    """How often an idle engine has to produce a token to stay ready."""
    canary_timeout_s: float = Field(120.0, gt=0.0)
    shutdown_timeout_s: int = Field(30, ge=1)
    """How long running requests may take to finish after SIGTERM."""
    vllm: dict[OptionName, Any] = {}
    """Any other engine argument of `vllm serve`, e.g. `max_num_seqs: 64`. `true` stands for a bare flag, `false` for
    `--no-` and its name; a list for several words, a mapping for JSON. Options that would part sampler and trainer, or
    that Tandem sets itself, are refused with the reason."""
    env: dict[str, str] = {}
    """Environment variables that vLLM reads, e.g. `VLLM_CPU_KVCACHE_SPACE: "1"`; set unless they are set already."""
    mock: MockConfig = MockConfig()

    @property
    def replica(self) -> str:
        """This replica's name."""
        return self.generator_id or f"{socket.gethostname()}-{self.port}"


class Settings(Section):
    """What the generator reads of the configuration."""

    shared: SharedConfig
    generator: GeneratorConfig
