"""The policy and its optimizer: one update a batch, under accelerate.

Tensor names end in their shape: B rows, T completion tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from tandem_protocol.config import SharedConfig

from .algorithms.base import LossFunction, Totals
from .batch import Batch
from .config import TrainerConfig
from .errors import UserError
from .logprobs import TokenLogprobs, check

OPTIMIZER_FILE = "optimizer.pt"
MODEL_DIR = "model"


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
            UserError: there is no such model, or its logits are not what `logprobs.py` computes.
        """
        self._shared, self._config, self._tokenizer, self._accelerator = shared, config, tokenizer, accelerator
        model = load_model(shared.model, shared)
        if config.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        policy = self._logprobs_of(model)
        check(policy)
        optim = config.optim
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
        )
        self._policy, self._optimizer = accelerator.prepare(policy, optimizer)
        # Not prepared: accelerate would step it once a rank.
        self._scheduler = get_scheduler(
            optim.lr_scheduler_type,
            optimizer,
            num_warmup_steps=optim.warmup_steps,
            num_training_steps=config.max_steps,
        )
        self._reference = self._frozen_copy(shared) if needs_reference else None

    @property
    def model(self) -> PreTrainedModel:
        model: PreTrainedModel = self._accelerator.unwrap_model(self._policy).model
        return model

    def update(self, batch: Batch, loss: LossFunction) -> dict[str, float]:
        """One optimizer step. The result does not depend on how the batch is cut into micro-batches or over ranks.

        Returns:
            loss, grad_norm, learning_rate and the loss function's metrics as means over the step's trained tokens.

        Raises:
            FloatingPointError: loss or gradient is not finite; the parameters are as before.
        """
        rows, tokens = self._sum([batch.row_total, batch.token_total])
        pieces = list(batch.to(self._accelerator.device).micro_batches(self._config.learner.max_tokens_per_micro_batch))
        sums: Counter[str] = Counter()
        self._optimizer.zero_grad()
        for piece in pieces:
            # Gradients travel between ranks once, with the last piece; ranks may have different numbers of pieces.
            with nullcontext() if piece is pieces[-1] else self._accelerator.no_sync(self._policy):
                sums.update(self._backward(piece, loss, Totals(int(rows), int(tokens))))
        stats = dict(zip(sorted(sums), self._sum([sums[name] for name in sorted(sums)]), strict=True))
        trained_tokens = stats.pop("tokens")
        loss_value = stats.pop("loss")
        grad_norm = float(
            self._accelerator.clip_grad_norm_(self._policy.parameters(), self._config.optim.max_grad_norm)
        )
        if not (math.isfinite(loss_value) and math.isfinite(grad_norm)):
            self._optimizer.zero_grad()
            raise FloatingPointError(
                f"the update has loss {loss_value} and gradient norm {grad_norm}; wanted finite numbers. The "
                "parameters are as before this step. Lower trainer.optim.learning_rate, or use "
                "trainer.learner.dtype: float32."
            )
        learning_rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        means = {name: value / max(trained_tokens, 1) for name, value in stats.items()}
        return {"loss": loss_value, "grad_norm": grad_norm, "learning_rate": learning_rate, **means}

    def _backward(self, piece: Batch, loss: LossFunction, totals: Totals) -> dict[str, float]:
        """Add the gradient of one micro-batch; returns its sums over tokens."""
        arguments = (piece.token_ids_BS, piece.prompt_lengths_B, piece.present_BT)
        logprobs_BT, entropy_BT = self._policy(*arguments)
        ref_logprobs_BT: Tensor | None = None
        if self._reference is not None:
            with torch.no_grad():
                ref_logprobs_BT, _ = self._reference(*arguments)
        share, means = loss(logprobs_BT, piece, totals, entropy_BT=entropy_BT, ref_logprobs_BT=ref_logprobs_BT)
        # Data parallelism averages gradients over ranks, and the loss is already a share of the whole.
        self._accelerator.backward(share * self._accelerator.num_processes)
        tokens = float(piece.mask_BT.sum())
        return {"loss": share.item(), "tokens": tokens} | {name: mean.item() * tokens for name, mean in means.items()}

    def save(self, directory: Path) -> None:
        """Write the model (a Hugging Face directory, tokenizer included) and the optimizer; main process only."""
        self.model.save_pretrained(directory / MODEL_DIR)
        self._tokenizer.save_pretrained(directory / MODEL_DIR)
        state = {"optimizer": self._optimizer.state_dict(), "scheduler": self._scheduler.state_dict()}
        try:
            torch.save(state | {"rng": torch.get_rng_state()}, directory / OPTIMIZER_FILE)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{directory / OPTIMIZER_FILE} cannot be written: {error}") from error

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""
        saved = load_model(directory / MODEL_DIR, self._shared)
        self.model.load_state_dict(saved.state_dict())
        state = torch.load(directory / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])

    def _logprobs_of(self, model: PreTrainedModel) -> TokenLogprobs:
        return TokenLogprobs(
            model, temperature=self._config.rollout.temperature, chunk_size=self._config.learner.logprob_chunk_size
        )

    def _frozen_copy(self, shared: SharedConfig) -> nn.Module:
        model = load_model(shared.model, shared).requires_grad_(False).eval()
        return self._logprobs_of(model).to(self._accelerator.device)

    def _sum(self, values: list[float]) -> list[float]:
        """Over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        return self._accelerator.reduce(tensor, reduction="sum").tolist()  # type: ignore[no-any-return]  # untyped library


def load_model(source: str | Path, shared: SharedConfig) -> PreTrainedModel:
    """The model in float32, without dropout: the generator that its logprobs are compared with has none.

    Raises:
        UserError: there is no such model.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, revision=shared.revision, trust_remote_code=shared.trust_remote_code, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"shared.model {str(source)!r} cannot be loaded: {error}. Wanted a directory with a Hugging Face model "
            "(relative to the project's folder) or an id on the hub."
        ) from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model.train()
