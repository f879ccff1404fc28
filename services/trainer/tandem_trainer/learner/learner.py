"""The policy and its optimizer: one update per batch, under accelerate.

Tensor names end in their shape: B rows, T tokens from the first sampled one of a row to the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError

from ..algorithms.base import Algorithm, Mean, MicroBatchLoss, StepTotals
from ..algorithms.corrections import entropy_quantile
from ..batch import Batch
from ..devices import default_max_tokens, give_back_freed_memory
from ..micro_batches import PackedPrompts
from .causality import check_causal
from .logprobs import TokenLogprobs, check_logprobs
from .lora import adapter_disabled, add_adapter
from .mismatch import MismatchCheck
from .model import checkpoint_gradients, load_model
from .model_files import ModelFiles
from .optimizer import Schedule, make_optimizer
from .packed_prompts import packed_prompts
from .parallel import is_sharded, prepare_policy
from .positions import fix_positions
from .saving import Saver
from .shared_prompts import OPERATIONS_ON_CPU, why_unshared
from .step_metrics import MISMATCH, StepMetrics, WeightedMean, to_host, update_metrics
from .trained_tokens import TrainedTokens


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
            UserError: the model does not exist, `logprobs.py` cannot compute its logits, or it is not causal.
        """
        self._shared = shared
        self._config = config
        self._tokenizer = tokenizer
        self._accelerator = accelerator
        self._is_sharded = is_sharded(config.learner, accelerator)
        model = self._loaded(shared.model)
        if config.learner.gradient_checkpointing:
            checkpoint_gradients(model)
        if config.lora:
            add_adapter(model, config.lora, shared.model, shared.revision)
        policy = self._logprobs_of(model)
        if not self._gets_weights_from_rank_0:
            check_logprobs(policy)
            check_causal(policy)
        found = [self._tried_sharing(policy) if accelerator.is_main_process else None]
        self.unshared_because, self._packed = broadcast_object_list(found)[0]
        """Why prompts are computed once per row. None: once for several rows that begin with them."""
        if config.learner.compile:
            model.base_model.compile(dynamic=True)  # batches have different lengths
        self._policy = prepare_policy(policy, config.learner, accelerator)
        optimizer = make_optimizer(self._policy, config.optim)
        self._optimizer = accelerator.prepare(optimizer)
        # The schedule is not prepared, because accelerate would then step it once per rank.
        self._schedule = Schedule(optimizer, config.optim, max_steps=config.max_steps)
        self._needs_reference = needs_reference
        self._reference = self._frozen_copy(shared) if needs_reference and not config.lora else None
        self.mismatch_check: MismatchCheck | None = None
        """Set once the dtypes of the generators are known."""
        self.trained: TrainedTokens | None = None
        """What the last update computed about its sequences. None before its end."""
        self._is_within_update = False

    @property
    def completed_updates(self) -> int | None:
        """Number of updates that the parameters contain. None if the last update stopped between optimizer steps."""
        return None if self._is_within_update else self._schedule.updates

    @property
    def model(self) -> PreTrainedModel:
        """The model in training, without the wrappers around it."""
        model: PreTrainedModel = self._accelerator.unwrap_model(self._policy).model
        return model

    def fix_positions(self, max_model_lens: Sequence[int]) -> int:
        """Encode positions as generators with these values of `max_model_len` do.

        Returns:
            The longest row, in tokens, for which trainer and generators encode positions alike.

        Raises:
            UserError: the generators encode positions differently.
        """
        policies = (self._policy, self._reference) if self._reference else (self._policy,)
        return min(fix_positions(self._accelerator.unwrap_model(policy).model, max_model_lens) for policy in policies)

    def update(self, batch: Batch, algorithm: Algorithm) -> dict[str, float]:
        """Train on `batch`: make `algorithm.num_iterations` optimizer steps.

        The result does not depend on how the batch is split into micro-batches and over ranks.

        Returns:
            loss, grad_norm, learning_rate and the loss function's metrics: means over the trained tokens, or maxima.
            With several optimizer steps, they are taken over the steps too. `mismatch` is the mean of
            |logprob − sampler's logprob| in nats before the first optimizer step, over tokens that the current weights
            sampled. It is missing if there is no such token.

        Raises:
            FloatingPointError: loss or gradient is not finite. The parameters are as before that optimizer step.
            UserError: the mismatch is too high. The parameters are as before this update.
        """
        self.trained = None  # its sequences need memory
        micro_batches = self._micro_batches(batch)
        old_logprobs: list[Tensor] = []
        steps = []
        for iteration in range(algorithm.num_iterations):
            steps.append(self._step(micro_batches, algorithm, old_logprobs))
            self._is_within_update = iteration < algorithm.num_iterations - 1
        self.trained = TrainedTokens(batch, micro_batches, old_logprobs)
        learning_rate = self._schedule.learning_rate
        self._schedule.advance()
        return update_metrics(steps, learning_rate)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """Split the batch into micro-batches. With sharded parameters, every rank gets the same number of them."""
        on_device = batch.to(self._accelerator.device)
        shares_prompts = self.unshared_because is None
        micro_batches = list(
            on_device.micro_batches(self._max_tokens, shares_prompts=shares_prompts, packed=self._packed)
        )
        if self._is_sharded:
            most = max(gather_object([len(micro_batches)]))
            micro_batches += [micro_batches[0].weightless()] * (most - len(micro_batches))
        return micro_batches

    def _step(self, micro_batches: list[Batch], algorithm: Algorithm, old_logprobs: list[Tensor]) -> StepMetrics:
        """Make one optimizer step. The first step of a batch fills `old_logprobs`, one tensor per micro-batch."""
        is_first = not old_logprobs
        totals = self._totals(micro_batches, algorithm)
        own_loss = 0.0
        own_metrics = []
        self._optimizer.zero_grad()
        for index, micro_batch in enumerate(micro_batches):
            # Full gradients are reduced once, with the last micro-batch, because ranks may have different numbers of
            # micro-batches. Sharded gradients are reduced with every micro-batch, because full ones need more memory.
            reduces = self._is_sharded or index == len(micro_batches) - 1
            old_logprobs_BT = None if is_first else old_logprobs[index]
            with nullcontext() if reduces else self._accelerator.no_sync(self._policy):
                logprobs_BT, micro_batch_loss = self._backward(micro_batch, algorithm, totals, old_logprobs_BT)
            metrics = dict(micro_batch_loss.metrics)
            if is_first:
                metrics[MISMATCH] = self._mismatch(logprobs_BT, micro_batch)
                old_logprobs.append(logprobs_BT)
            loss, means = to_host(micro_batch_loss.loss, metrics)
            own_loss += loss
            own_metrics.append(means)
        (total_loss,) = self._sum([own_loss])
        grad_norm = float(
            self._accelerator.clip_grad_norm_(self._policy.parameters(), self._config.optim.max_grad_norm)
        )
        if not (math.isfinite(total_loss) and math.isfinite(grad_norm)):
            self._optimizer.zero_grad()
            raise FloatingPointError(
                f"the update has loss {total_loss} and gradient norm {grad_norm}, expected finite numbers. The "
                "parameters are as before this optimizer step. Fix: lower trainer.optim.learning_rate, or use "
                "trainer.learner.dtype: float32."
            )
        all_metrics: list[dict[str, WeightedMean]] = gather_object(own_metrics)
        mismatch = self._checked_mismatch([metrics.pop(MISMATCH) for metrics in all_metrics]) if is_first else None
        self._optimizer.step()
        return StepMetrics(total_loss, grad_norm, all_metrics, mismatch)

    def _mismatch(self, logprobs_BT: Tensor, micro_batch: Batch) -> Mean:
        """Mean of |logprob − sampler's logprob| over the tokens in the loss that the current weights sampled."""
        weights_BT = micro_batch.mask_BT * (micro_batch.sampled_at_BT == self._schedule.updates)
        return Mean.over((logprobs_BT - micro_batch.sampler_logprobs_BT).abs(), weights_BT)

    def _checked_mismatch(self, means: list[WeightedMean]) -> float | None:
        """Merge the micro-batches' means and check the result. None if no token was sampled by the current weights.

        Raises:
            UserError: the mismatch is too high.
        """
        tokens = sum(weight for _, weight in means)
        if not tokens:
            return None
        mismatch = sum(value * weight for value, weight in means) / tokens
        if self.mismatch_check:
            try:
                self.mismatch_check.update(mismatch, tokens)
            except UserError:
                self._optimizer.zero_grad()
                raise
        return mismatch

    def _backward(
        self, micro_batch: Batch, algorithm: Algorithm, totals: StepTotals, old_logprobs_BT: Tensor | None
    ) -> tuple[Tensor, MicroBatchLoss]:
        """Add the gradient of one micro-batch. Returns its logprobs, and its part of the step's loss."""
        ref_logprobs_BT = self._ref_logprobs(micro_batch) if self._needs_reference else None
        logprobs_BT, entropy_BT = self._policy(*micro_batch.model_inputs)
        micro_batch_loss = algorithm.loss(
            logprobs_BT,
            micro_batch,
            totals,
            entropy_BT=entropy_BT,
            old_logprobs_BT=logprobs_BT.detach() if old_logprobs_BT is None else old_logprobs_BT,
            ref_logprobs_BT=ref_logprobs_BT,
        )
        # Data parallelism averages gradients over ranks, but the losses of all micro-batches have to be summed.
        self._accelerator.backward(micro_batch_loss.loss * self._accelerator.num_processes)
        give_back_freed_memory()
        return logprobs_BT.detach(), micro_batch_loss

    @torch.no_grad()
    def _ref_logprobs(self, micro_batch: Batch) -> Tensor:
        """Logprobs of the policy that training started from: a frozen copy, or the policy without its adapter."""
        if self._reference is not None:
            logprobs_BT, _ = self._reference(*micro_batch.model_inputs)
        else:
            with adapter_disabled(self._policy):
                logprobs_BT, _ = self._policy(*micro_batch.model_inputs)
        return logprobs_BT  # type: ignore[no-any-return]  # calling a module returns Any

    def _totals(self, micro_batches: list[Batch], algorithm: Algorithm) -> StepTotals:
        """What the loss needs to know of the complete step, over all ranks."""
        trajectories, tokens = self._sum([micro_batches[0].trajectory_total, micro_batches[0].token_total])
        threshold = None
        if algorithm.entropy_quantile is not None:
            threshold = self._entropy_quantile(micro_batches, algorithm.entropy_quantile)
        return StepTotals(int(trajectories), int(tokens), threshold, self._config.rollout.max_completion_length)

    @torch.no_grad()
    def _entropy_quantile(self, micro_batches: list[Batch], quantile: float) -> Tensor:
        """Quantile of the entropies of all tokens in the loss, on all ranks."""
        entropies = [
            self._policy(*micro_batch.model_inputs)[1][micro_batch.mask_BT.bool()] for micro_batch in micro_batches
        ]
        # Entropies are never negative, so -1 marks the padding of ranks with fewer tokens.
        padded_N = self._accelerator.pad_across_processes(torch.cat(entropies), pad_index=-1)
        all_N = self._accelerator.gather(padded_N)
        return entropy_quantile(all_N[all_N >= 0], quantile)

    @property
    def checkpoint_bytes(self) -> int:
        """About how many bytes a checkpoint needs on disk."""
        return self._saver.checkpoint_bytes

    def rehearse(self, *, resumes: bool = False) -> None:
        """Test, before the first step, that the model can be saved, exported and published.

        Args:
            resumes: the run has a checkpoint. Then a full disk is not an error: the run tries again later.

        Raises:
            UserError: says what cannot be saved, and why.
        """
        self._saver.rehearse(resumes=resumes)

    def save(self, directory: Path) -> None:
        """Write the optimizer and the model, or its adapter, as a folder that transformers or peft can load.

        Raises:
            PartFailed: on every rank, for instance when the disk is full.
        """
        self._saver.save(directory)

    def load(self, directory: Path) -> None:
        """Load what `save` wrote: weights, moments and counts. Settings come from the configuration."""
        self._saver.load(directory, self._loaded)

    @cached_property
    def _saver(self) -> Saver:
        files = ModelFiles(self.model, self._tokenizer, self._shared)
        return Saver(self._config, self._shared, self._accelerator, self.model, files, self._optimizer, self._schedule)

    def _loaded(self, source: str | Path) -> PreTrainedModel:
        return load_model(source, self._shared, without_weights=self._gets_weights_from_rank_0)

    @property
    def _gets_weights_from_rank_0(self) -> bool:
        """True on ranks that receive their weights from rank 0."""
        return self._is_sharded and not self._accelerator.is_main_process

    def _logprobs_of(self, model: PreTrainedModel) -> TokenLogprobs:
        return TokenLogprobs(
            model,
            temperature=self._config.rollout.temperature,
            chunk_size=self._config.learner.logprob_chunk_size,
            packs_prompts=self._config.learner.gradient_checkpointing or self._is_sharded,
        )

    def _tried_sharing(self, policy: TokenLogprobs) -> tuple[str | None, PackedPrompts | None]:
        """Return why prompts are not shared, or None, and what packing them costs, if they are packed."""
        most = None
        if self._is_sharded:  # the whole model may not fit on the device
            most = OPERATIONS_ON_CPU
        else:
            policy.to(self._accelerator.device)
        reason = why_unshared(policy, self._config.learner, self._max_tokens, most_operations=most)
        return reason, packed_prompts(policy.model) if policy.packs_prompts and not reason else None

    @property
    def _max_tokens(self) -> int:
        return self._config.learner.max_tokens_per_micro_batch or default_max_tokens(self._accelerator.device)

    def _frozen_copy(self, shared: SharedConfig) -> nn.Module:
        policy = self._logprobs_of(self._loaded(shared.model).requires_grad_(False))
        return prepare_policy(policy, self._config.learner, self._accelerator)

    def _sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        return self._accelerator.reduce(tensor, reduction="sum").tolist()  # type: ignore[no-any-return]  # untyped library
