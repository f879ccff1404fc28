"""Sharding parameters over ranks with FSDP2, and saving weights and optimizer, of which each rank writes its part.

It uses torch's `fully_shard` directly. accelerate's plug-in does not support CPUs, and the tests on CPUs should run the
same code as training on GPUs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from transformers import PreTrainedModel

from tandem_protocol.config.learning import LearnerConfig
from tandem_protocol.manifest import read_header
from tandem_protocol.problems import one_line

from .logprobs import TokenLogprobs
from .shards import model_table, model_tensors, write_part

OPTIMIZER_DIR = "optimizer"


def is_sharded(config: LearnerConfig, accelerator: Accelerator) -> bool:
    """True if each rank holds only a part of each parameter."""
    return config.parallelism == "fsdp2" and accelerator.num_processes > 1


def prepare_policy(policy: TokenLogprobs, config: LearnerConfig, accelerator: Accelerator) -> nn.Module:
    """Prepare `policy` for all ranks: shard it (FSDP2), replicate it (DDP), or move a frozen one to the device.

    If it is sharded, all weights come from the main process, and other ranks may pass a model without weights.
    """
    if is_sharded(config, accelerator):
        weights = policy.model.state_dict()
        _shard(policy, accelerator, getattr(torch, config.dtype))
        # Allocate the weights here. Otherwise torch guesses their device, with a warning.
        policy._apply(  # type: ignore[no-untyped-call]  # torch's
            lambda tensor: torch.empty_like(tensor, device=accelerator.device) if tensor.is_meta else tensor
        )
        load_weights(policy.model, weights, from_main=True)
        return policy
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        return policy.to(accelerator.device)
    wrapped: nn.Module = accelerator.prepare(policy)
    _warm_up_ddp_buckets(wrapped, accelerator)
    return wrapped


def _shard(policy: TokenLogprobs, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Shard `policy` in place. It computes in `dtype`, and its parameters keep their dtype.

    Each layer is gathered while it computes. Parameters outside of layers, such as embeddings, are gathered for a
    complete forward or backward pass.

    Source: FSDP2, docs of `torch.distributed.fsdp.fully_shard`.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = set(policy.model._no_split_modules or ())
    for module in list(policy.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)


def load_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], *, from_main: bool) -> None:
    """Load complete (not sharded) `weights` into `model`. Each rank keeps its part.

    Args:
        from_main: broadcast the main process's `weights` tensor by tensor. Otherwise each rank passes them itself.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_main)
    mine: dict[str, Any] = dict(weights) if not from_main or torch.distributed.get_rank() == 0 else {}
    set_model_state_dict(model, mine, options=options)
    if from_main:
        model.tie_weights()  # torch has given each name its own tensor


def _warm_up_ddp_buckets(policy: nn.Module, accelerator: Accelerator) -> None:
    """Run one backward pass, after which DDP rearranges its buckets for all later passes.

    With four or more ranks, the arrangement decides the order in which gradients are summed. Without this pass, the
    first update of a resumed run would differ in the last bit from the same update of an uninterrupted run.
    """
    token_ids_BS = torch.arange(2, device=accelerator.device)[None]
    starts_B = torch.ones_like(token_ids_BS[:, 0])
    sampled_mask_BT = torch.ones_like(token_ids_BS[:, 1:]).bool()
    logprobs_BT, _ = policy(token_ids_BS, starts_B, sampled_mask_BT)
    accelerator.backward(0.0 * logprobs_BT.sum())
    policy.zero_grad()


def save_part(model: PreTrainedModel, directory: Path, accelerator: Accelerator) -> None:
    """Write this rank's part of the weights. Every rank calls it at the same time."""
    directory.mkdir(parents=True, exist_ok=True)
    write_part(
        directory,
        model_table(model, torch.float32),
        model_tensors(model, torch.float32),
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )


def save_index(directory: Path) -> None:
    """Write the index that combines the parts of all ranks into the weights of a Hugging Face folder."""
    files = sorted(directory.glob("model-*.safetensors"))
    if len(files) == 1:
        files[0].rename(directory / "model.safetensors")
        return
    index = {"metadata": {}, "weight_map": {entry.name: file.name for file in files for entry in read_header(file)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def save_optimizer(policy: nn.Module, optimizer: Optimizer, directory: Path) -> None:
    """Write this rank's part of the optimizer's moments and step counts. Before the first step there are none.

    Settings such as learning rate and betas are not saved, so that a resumed run takes them from its configuration.

    Raises:
        OSError: it cannot be written.
    """
    if not optimizer.state:
        return
    with _maybe_alone() as alone, _failing_as_oserror(f"{directory / OPTIMIZER_DIR} cannot be written"):
        state = {"state": get_optimizer_state_dict(policy, optimizer)["state"]}
        save(state, checkpoint_id=directory / OPTIMIZER_DIR, no_dist=alone)


def load_optimizer(policy: nn.Module, optimizer: Optimizer, directory: Path) -> None:
    """Load the moments and step counts that `save_optimizer` wrote.

    Raises:
        OSError: they cannot be read.
    """
    current = get_optimizer_state_dict(policy, optimizer)
    state = {"state": current["state"]}
    with _maybe_alone() as alone, _failing_as_oserror(f"{directory / OPTIMIZER_DIR} cannot be read"):
        load(state, checkpoint_id=directory / OPTIMIZER_DIR, no_dist=alone)
    set_optimizer_state_dict(policy, optimizer, current | state)


@contextmanager
def _failing_as_oserror(message: str) -> Iterator[None]:
    """Turn torch's CheckpointException into an OSError with a short message.

    CheckpointException is not an `Exception`, and its text contains a traceback for each rank.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        described = dict.fromkeys(f"{type(cause).__name__}: {one_line(cause)}" for cause in causes)
        problem = OSError(f"{message}: {'; '.join(described)}")
        problem.errno = next((cause.errno for cause in causes if isinstance(cause, OSError)), None)
        raise problem from error


@contextmanager
def _maybe_alone() -> Iterator[bool]:
    """Yield True if this is the only process, and silence torch's warning about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not torch.distributed.is_initialized()
