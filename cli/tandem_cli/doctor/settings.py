"""The configuration keys that the doctor uses. A test compares their defaults with those of the services."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _DoctorPart(BaseModel):
    """A section of config.yaml. Other keys are ignored here: the services check them."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class DoctorSharedPart(_DoctorPart):
    model: str
    revision: str | None = None


class DoctorGeneratorPart(_DoctorPart):
    engine: Literal["vllm", "mock"] = "vllm"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    vllm: dict[str, Any] = {}
    env: dict[str, str] = {}


class DoctorLearnerPart(_DoctorPart):
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_tokens_per_micro_batch: int | None = None
    logprob_chunk_size: int = 1024
    gradient_checkpointing: bool = False


class DoctorGrpoPart(_DoctorPart):
    beta: float = 0.0


class DoctorKeepPart(_DoctorPart):
    keep: int = 2


class DoctorRolloutPart(_DoctorPart):
    num_prompts: int = 16


class DoctorTrainerPart(_DoctorPart):
    rollout: DoctorRolloutPart = DoctorRolloutPart()
    learner: DoctorLearnerPart = DoctorLearnerPart()
    grpo: DoctorGrpoPart = DoctorGrpoPart()
    checkpoint: DoctorKeepPart = DoctorKeepPart()
    publish: DoctorKeepPart = DoctorKeepPart()


class DoctorSettings(_DoctorPart):
    shared: DoctorSharedPart
    generator: DoctorGeneratorPart = DoctorGeneratorPart()
    trainer: DoctorTrainerPart = DoctorTrainerPart()
