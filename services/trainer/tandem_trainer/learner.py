"""The policy and its optimizer: one update a batch, under accelerate.

Tensor names end in their shape: B rows, T completion tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tandem_protocol.config import SharedConfig

from .algorithms.base import Algorithm, Mean, MicroBatchLoss, Totals
from .algorithms.corrections import entropy_quantile
from .batch import Batch
from .causality import check_causal
from .config import TrainerConfig
from .devices import default_max_tokens, give_back_freed_memory
from .errors import UserError
from .logprobs import TokenLogprobs, check
from .lora import adapter_disabled, add_adapter, load_adapter, write_adapter
from .mismatch import MismatchCheck
from .model import checkpoint_gradients, load_model
from .model_files import ModelFiles
from .optimizer import Schedule, make_optimizer
from .parallel import is_sharded, load_optimizer, load_weights, save_index, save_optimizer, save_part, shard
from .positions import fix_positions
from .ranks import do_together
from .rehearsal import rehearse

MODEL_DIR, STATE_FILE = "model", "learner.pt"
MISMATCH = "mismatch"


class Learner:
    """Turns batches into optimizer steps. Every rank calls every method at the same time."""

    def __init__(
        self,
        shared: SharedConfig,
        config: TrainerConfig,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        *,
        needs_reference: bool,
    ) -> None:
        """Load the model.

        Raises:
            UserError: there is no such model, its logits are not what `logprobs.py` computes, or it is not causal.
        """
        self._shared, self._config, self._tokenizer, self._accelerator = shared, config, tokenizer, accelerator
        self._is_sharded = is_sharded(config.learner, accelerator)
        model = self._loaded(shared.model)
        if config.learner.gradient_checkpointing:
            checkpoint_gradients(model)
        if config.lora:
            add_adapter(model, config.lora, shared.model, shared.revision)
        policy = self._logprobs_of(model)
        if not self._is_elsewhere:
            check(policy)
            check_causal(policy)
        if config.learner.compile:
            model.base_model.compile(dynamic=True)  # lengths differ from batch to batch
        self._policy = shard(policy, config.learner, accelerator)
        optimizer = make_optimizer(self._policy, config.optim)
        self._optimizer = accelerator.prepare(optimizer)
        # Not prepared: accelerate would step it once per rank.
        self._schedule = Schedule(optimizer, config.optim, max_steps=config.max_steps)
        self._needs_reference = needs_reference
        self._reference = self._frozen_copy(shared) if needs_reference and not config.lora else None
        self.mismatch: MismatchCheck | None = None  # until the generators are known
        self._is_whole = True

    @property
    def whole_updates(self) -> int | None:
        """The step of the version that the parameters are; None after some of a batch's optimizer steps."""
        return self._schedule.updates if self._is_whole else None

    @property
    def model(self) -> PreTrainedModel:
        model: PreTrainedModel = self._accelerator.unwrap_model(self._policy).model
        return model

    def fix_positions(self, max_model_lens: Sequence[int]) -> int:
        """Encode positions as generators that take `max_model_lens` tokens do; returns the longest row we agree on.

        Raises:
            UserError: the generators differ among each other.
        """
        policies = (self._policy, self._reference) if self._reference else (self._policy,)
        return min(fix_positions(self._accelerator.unwrap_model(policy).model, max_model_lens) for policy in policies)

    def update(self, batch: Batch, algorithm: Algorithm) -> dict[str, float]:
        """`algorithm.num_iterations` optimizer steps; how the batch is cut and spread over ranks changes no value.

        Returns:
            loss, grad_norm, learning_rate and the loss function's metrics (means over the trained tokens, or maxima);
            over the optimizer steps too. `mismatch` is the mean of |logprob − sampler's logprob| in nats, before the
            first optimizer step, over tokens that these weights sampled; it is missing without any.

        Raises:
            FloatingPointError: loss or gradient is not finite; the parameters are as before that optimizer step.
            UserError: the mismatch is too high; the parameters are as before this update.
        """
        micro_batches = self._micro_batches(batch)
        old_logprobs: list[Tensor] = []
        steps = []
        for left in reversed(range(algorithm.num_iterations)):
            steps.append(self._step(micro_batches, algorithm, old_logprobs))
            self._is_whole = not left
        learning_rate = self._schedule.learning_rate
        self._schedule.advance()
        means = {name: statistics.fmean(getattr(step, name) for step in steps) for name in ("loss", "grad_norm")}
        metrics = _combined([m for step in steps for m in step.metrics])
        mismatch = {} if steps[0].mismatch is None else {MISMATCH: steps[0].mismatch}
        return means | {"learning_rate": learning_rate} | mismatch | metrics

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """The batch in micro-batches, as many on every rank if each of them gathers parameters."""
        device = self._accelerator.device
        max_tokens = self._config.learner.max_tokens_per_micro_batch or default_max_tokens(device)
        micro_batches = list(batch.to(device).micro_batches(max_tokens))
        if self._is_sharded:
            most = max(gather_object([len(micro_batches)]))
            micro_batches += [micro_batches[0].weightless()] * (most - len(micro_batches))
        return micro_batches

    def _step(self, micro_batches: list[Batch], algorithm: Algorithm, old_logprobs: list[Tensor]) -> _Step:
        """One optimizer step; fills `old_logprobs`, one per micro-batch, if this is the batch's first."""
        totals, first = self._totals(micro_batches, algorithm), not old_logprobs
        losses, metrics = [], []
        self._optimizer.zero_grad()
        for index, micro_batch in enumerate(micro_batches):
            # Full gradients are reduced once, with the last micro-batch: ranks may have different numbers of them.
            # Sharded gradients are reduced with every micro-batch: waiting would need the memory of full ones.
            travels = self._is_sharded or index == len(micro_batches) - 1
            with nullcontext() if travels else self._accelerator.no_sync(self._policy):
                logprobs_BT, share = self._backward(
                    micro_batch, algorithm, totals, None if first else old_logprobs[index]
                )
            if first:
                share.metrics[MISMATCH] = self._mismatch(logprobs_BT, micro_batch)
            loss, means = _on_host(share)
            losses.append(loss)
            metrics.append(means)
            if first:
                old_logprobs.append(logprobs_BT)
        (whole_loss,) = self._sum([sum(losses)])
        grad_norm = float(
            self._accelerator.clip_grad_norm_(self._policy.parameters(), self._config.optim.max_grad_norm)
        )
        if not (math.isfinite(whole_loss) and math.isfinite(grad_norm)):
            self._optimizer.zero_grad()
            raise FloatingPointError(
                f"the update has loss {whole_loss} and gradient norm {grad_norm}, expected finite numbers. The "
                "parameters are as before this optimizer step. Lower trainer.optim.learning_rate, or use "
                "trainer.learner.dtype: float32."
            )
        everyones: list[dict[str, tuple[float, float]]] = gather_object(metrics)
        mismatch = self._judged([part.pop(MISMATCH) for part in everyones]) if first else None
        self._optimizer.step()
        return _Step(whole_loss, grad_norm, everyones, mismatch)

    def _mismatch(self, logprobs_BT: Tensor, micro_batch: Batch) -> Mean:
        """Of |logprob − sampler's logprob| over the tokens in the loss that the weights of today sampled."""
        weights_BT = micro_batch.mask_BT * (micro_batch.sampled_at_BT == self._schedule.updates)
        return Mean.over((logprobs_BT - micro_batch.sampler_logprobs_BT).abs(), weights_BT)

    def _judged(self, parts: list[tuple[float, float]]) -> float | None:
        """The mean over all parts, after the check; None without any token."""
        tokens = sum(weight for _, weight in parts)
        if not tokens:
            return None
        mismatch = sum(value * weight for value, weight in parts) / tokens
        if self.mismatch:
            try:
                self.mismatch.update(mismatch, tokens)
            except UserError:
                self._optimizer.zero_grad()
                raise
        return mismatch

    def _backward(
        self, micro_batch: Batch, algorithm: Algorithm, totals: Totals, old_logprobs_BT: Tensor | None
    ) -> tuple[Tensor, MicroBatchLoss]:
        """Add the gradient of one micro-batch; returns its logprobs and what it adds to the step."""
        ref_logprobs_BT = self._ref_logprobs(micro_batch) if self._needs_reference else None
        logprobs_BT, entropy_BT = self._policy(*micro_batch.model_inputs)
        share = algorithm.loss(
            logprobs_BT,
            micro_batch,
            totals,
            entropy_BT=entropy_BT,
            old_logprobs_BT=logprobs_BT.detach() if old_logprobs_BT is None else old_logprobs_BT,
            ref_logprobs_BT=ref_logprobs_BT,
        )
        # Data parallelism averages gradients over ranks, and the loss is already a share of the whole.
        self._accelerator.backward(share.loss * self._accelerator.num_processes)
        give_back_freed_memory()
        return logprobs_BT.detach(), share

    @torch.no_grad()
    def _ref_logprobs(self, micro_batch: Batch) -> Tensor:
        """Of the policy that training started from: a frozen copy, or this one without its adapter."""
        if self._reference is not None:
            logprobs_BT, _ = self._reference(*micro_batch.model_inputs)
        else:
            with adapter_disabled(self._policy):
                logprobs_BT, _ = self._policy(*micro_batch.model_inputs)
        return logprobs_BT  # type: ignore[no-any-return]  # a module answers with anything

    def _totals(self, micro_batches: list[Batch], algorithm: Algorithm) -> Totals:
        rows, tokens = self._sum([micro_batches[0].row_total, micro_batches[0].token_total])
        threshold = None
        if algorithm.entropy_quantile is not None:
            threshold = self._entropy_quantile(micro_batches, algorithm.entropy_quantile)
        return Totals(int(rows), int(tokens), threshold)

    @torch.no_grad()
    def _entropy_quantile(self, micro_batches: list[Batch], quantile: float) -> Tensor:
        """Of all tokens in the loss, on all ranks."""
        entropies = [
            self._policy(*micro_batch.model_inputs)[1][micro_batch.mask_BT.bool()] for micro_batch in micro_batches
        ]
        # Entropies are never negative, so -1 marks the padding of ranks with fewer tokens.
        padded_N = self._accelerator.pad_across_processes(torch.cat(entropies), pad_index=-1)
        everyones_N = self._accelerator.gather(padded_N)
        return entropy_quantile(everyones_N[everyones_N >= 0], quantile)

    @cached_property
    def _files(self) -> ModelFiles:
        return ModelFiles(self.model, self._tokenizer, self._shared)

    def rehearse(self) -> None:
        """Try before the first step what checkpoints, exports and published versions will need.

        Raises:
            UserError: what of the model cannot be saved, and why.
        """
        if self._accelerator.is_main_process:
            rehearse(self.model, self._files, self._shared, self._config)

    def save(self, directory: Path) -> None:
        """Write the model or its adapter (a folder as transformers and peft have it) and the optimizer; all ranks do.

        Raises:
            PartFailed: on every rank, for instance when the disk is full.
        """
        do_together(
            self._accelerator,
            partial(self._save_model, directory / MODEL_DIR),
            partial(save_optimizer, self.model, self._optimizer.optimizer, directory),
            partial(self._save_rest, directory),
        )

    def _save_model(self, directory: Path) -> None:
        is_main = self._accelerator.is_main_process
        if self._config.lora:
            write_adapter(self.model, directory, torch.float32, is_main=is_main)
        else:
            save_part(self.model, directory, self._accelerator)

    def _save_rest(self, directory: Path) -> None:
        """Of which the main process alone has to write something."""
        if not self._accelerator.is_main_process:
            return
        model_dir = directory / MODEL_DIR
        if not self._config.lora:
            save_index(model_dir)
        self._files.copy_to(model_dir, adapter=self._config.lora is not None)
        state = {"updates": self._schedule.updates, "rng": torch.get_rng_state()}
        try:
            torch.save(state, directory / STATE_FILE)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{directory / STATE_FILE} cannot be written: {error}") from error

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote: weights, moments and counts. Settings stay those of the configuration."""
        if self._config.lora:
            load_adapter(self.model, directory / MODEL_DIR)
        else:
            load_weights(self.model, self._loaded(directory / MODEL_DIR).state_dict(), from_main=self._is_sharded)
        state = torch.load(directory / STATE_FILE, weights_only=True, map_location="cpu")
        if state["updates"]:  # there are no moments before the first
            load_optimizer(self.model, self._optimizer.optimizer, directory)
        self._schedule.resume(state["updates"])
        torch.set_rng_state(state["rng"])

    def _loaded(self, source: str | Path) -> PreTrainedModel:
        return load_model(source, self._shared, without_weights=self._is_elsewhere)

    @property
    def _is_elsewhere(self) -> bool:
        """True on ranks that receive their weights from rank 0."""
        return self._is_sharded and not self._accelerator.is_main_process

    def _logprobs_of(self, model: PreTrainedModel) -> TokenLogprobs:
        return TokenLogprobs(
            model, temperature=self._config.rollout.temperature, chunk_size=self._config.learner.logprob_chunk_size
        )

    def _frozen_copy(self, shared: SharedConfig) -> nn.Module:
        policy = self._logprobs_of(self._loaded(shared.model).requires_grad_(False))
        return shard(policy, self._config.learner, self._accelerator)

    def _sum(self, values: list[float]) -> list[float]:
        """Over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        return self._accelerator.reduce(tensor, reduction="sum").tolist()  # type: ignore[no-any-return]  # untyped library


class _Step(NamedTuple):
    loss: float
    grad_norm: float
    metrics: list[dict[str, tuple[float, float]]]
    """Value and weight, of every micro-batch on every rank."""
    mismatch: float | None


def _on_host(share: MicroBatchLoss) -> tuple[float, dict[str, tuple[float, float]]]:
    """Loss, and value and weight of each metric, in one transfer."""
    scalars = [share.loss.detach(), *(scalar for mean in share.metrics.values() for scalar in mean)]
    loss, *rest = torch.stack(scalars).tolist()
    return loss, dict(zip(share.metrics, zip(rest[::2], rest[1::2], strict=True), strict=True))


def _combined(parts: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over what the parts' means are over; maxima."""
    return {name: _mean_or_max(name, [part[name] for part in parts]) for name in parts[0]}


def _mean_or_max(name: str, parts: list[tuple[float, float]]) -> float:
    if name.endswith("/max"):
        return max(value for value, _ in parts)
    return sum(value * weight for value, weight in parts) / max(sum(weight for _, weight in parts), 1)
