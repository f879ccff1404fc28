"""Settings of the generator.

The options that `trl vllm-serve` documents have the same names here.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from .sections import Section, SharedConfig
from .vllm_options import refuse_owned

OptionName = Annotated[str, AfterValidator(lambda name: name.lower().replace("-", "_"))]
"""Name of a vLLM option. `max-num-seqs` and `MAX_NUM_SEQS` become `max_num_seqs`."""


class FaultsConfig(Section):
    """Faults of the mock engine, to test how a trainer handles them. Rates are probabilities per request."""

    latency_s: float = Field(0.0, ge=0.0)
    """Delay before each group, in seconds."""
    token_latency_s: float = Field(0.0, ge=0.0)
    """Delay before each token, in seconds. The groups of a request are sampled at the same time. Set it to more than 0
    to test switches in the middle of a completion."""
    error_rate: float = Field(0.0, ge=0.0, le=1.0)
    """Probability that the answer ends early with an `engine_failed` line."""
    drop_rate: float = Field(0.0, ge=0.0, le=1.0)
    """Probability that the connection breaks in the middle of the answer."""
    stale: bool = False
    """Label all tokens with the first version that was loaded, while the generator reports the newest one."""
    load_failures: int = Field(0, ge=0)
    """Number of weight loads that fail half-way, counted from the start."""


class MockConfig(Section):
    """Settings of the mock engine, which needs neither a model nor a GPU."""

    vocab_size: int | None = Field(None, ge=2)
    """Size of the vocabulary. None: the value in the model's `config.json`, or 256 if there is none."""
    script: Path | None = None
    """File with the turns that the mock says: JSONL, or YAML with a list. Each row has a `prompt` or `regex` that it
    answers, and `turns` or `samples`. None: random tokens."""
    faults: FaultsConfig = FaultsConfig()
    """Faults to inject, for tests of a trainer."""


class GeneratorConfig(Section):
    """Settings of the generator. The options from `host` to `enforce_eager` have the names of `trl vllm-serve`."""

    engine: Literal["vllm", "mock"] = "vllm"
    """Inference engine. `mock` samples from a fixed distribution without a model, for tests of a trainer."""
    host: str = "127.0.0.1"
    """Address to listen on. An address that other machines can reach requires a token."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Number of GPUs that share each layer of the model."""
    data_parallel_size: int = Field(1, ge=1)
    """Number of copies of the model in this replica. Each copy uses `tensor_parallel_size` GPUs."""
    gpu_memory_utilization: float | None = Field(None, gt=0.0, le=1.0)
    """Fraction of the GPU memory for weights and KV cache. None: vLLM's default."""
    dtype: str = "auto"
    """Data type to compute in, such as `bfloat16`. `auto`: vLLM's choice, usually the data type in `config.json`."""
    max_model_len: int | None = Field(None, ge=1)
    """Maximum length of prompt and completion together, in tokens. None: the value in the model's `config.json`."""
    enable_prefix_caching: bool | None = None
    """Reuse the KV cache of prompts that start with the same tokens. None: vLLM's default."""
    enforce_eager: bool | None = None
    """Run the model without CUDA graphs and compilation: a faster start, slower sampling. None: vLLM's default."""
    generator_id: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """Name of this replica in leases and logs. None: host name and port."""
    visible_timeout_s: float = Field(60.0, gt=0.0)
    """How long to wait until a published version appears on this side of the shared volume, in seconds."""
    switch_timeout_s: float = Field(300.0, gt=0.0)
    """Time limit of a switch, in seconds: once for pausing the engine (with `drain`, until running requests have
    finished) and once for loading the weights. If it is exceeded, the old version stays."""
    materialize_dir: Path | None = None
    """Folder on this machine, best in memory, where the complete files of delta versions are made. It needs space for
    two versions. None: the system's folder for temporary files. See `trainer.publish.delta`."""
    canary_every_s: float = Field(15.0, gt=0.0)
    """How often an idle engine must produce a token to stay ready, in seconds. After three failures in a row the
    generator restarts."""
    canary_timeout_s: float = Field(120.0, gt=0.0)
    """How long the engine may take to produce this token, in seconds."""
    shutdown_timeout_s: int = Field(30, ge=1)
    """How long running requests may take to finish after SIGTERM, in seconds."""
    vllm: dict[OptionName, Any] = {}
    """Further options of `vllm serve`, such as `max_num_seqs: 64`. `true` becomes `--name`, `false`
    becomes `--no-name`, a list becomes several words, and a mapping becomes JSON. Options that Tandem sets itself are
    refused, and so are options that would make generator and trainer compute different models."""
    env: dict[str, str] = {}
    """Environment variables for vLLM, such as `VLLM_CPU_KVCACHE_SPACE: "1"`. Variables that are already set win."""
    mock: MockConfig = MockConfig()
    """Settings of `engine: mock`."""

    @field_validator("vllm")
    @classmethod
    def _are_not_tandems(cls, options: dict[str, Any]) -> dict[str, Any]:
        refuse_owned(options)
        return options

    @property
    def replica(self) -> str:
        """Name of this replica."""
        return self.generator_id or f"{socket.gethostname()}-{self.port}"


class GeneratorSettings(Section):
    """The sections that the generator reads."""

    shared: SharedConfig
    generator: GeneratorConfig
