"""Check that trainer and generators compute the same probabilities for the same tokens.

With the same weights they should agree up to rounding. Different position encodings, kernels, quantization or missing
weights make them differ, and training would then be biased without any error.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError
from tandem_rollout.sampler import UNSHAPED

EXPECTED_FLOAT32 = 1e-3
"""Largest mismatch that rounding explains if both sides use float32, in nats per token (docs/reference/measured.md)."""
EXPECTED_16_BIT = 0.05
"""The same if one side uses another dtype."""
DECAY = 0.8
"""Decay of the moving average per update."""
MIN_TOKENS = 32
"""An average over fewer tokens is not checked."""


class MismatchTooHigh(UserError):
    """Trainer and generators compute different probabilities for the same tokens under the same weights."""


class MismatchCheck:
    """Checks a moving average of |trainer's logprob − sampler's logprob|, in nats per token.

    It counts only tokens that the current weights sampled, because an older policy has different probabilities anyway.
    """

    def __init__(self, config: TrainerConfig, dtypes: Iterable[str | None]) -> None:
        """
        Args:
            dtypes: dtypes of the generators' engines; None for an engine that does not run the model (the mock).
        """
        self._bound = config.max_mismatch
        self._dtypes = (config.learner.dtype, *dict.fromkeys(dtypes))
        exact = set(self._dtypes) == {"float32"}
        self._expected = EXPECTED_FLOAT32 if exact else EXPECTED_16_BIT
        is_reshaped = any(getattr(config.rollout, name) != value for name, value in UNSHAPED.items())
        self.is_on = None not in self._dtypes and not is_reshaped
        """Whether the probabilities of both sides compare."""
        self._sum = self._tokens = 0.0

    @property
    def excess(self) -> float | None:
        """The average, as a multiple of what the dtypes explain. None if it is over too few tokens, or not checked."""
        return self._sum / self._tokens / self._expected if self._tokens >= MIN_TOKENS else None

    def update(self, mismatch: float, tokens: float) -> None:
        """Add the mean mismatch over `tokens` tokens of one update, and check the average.

        Raises:
            MismatchTooHigh: the average is above `trainer.max_mismatch`.
        """
        if not self.is_on or not tokens:
            return
        decay = DECAY if self._tokens >= MIN_TOKENS else 1.0  # so that short completions add up to MIN_TOKENS
        self._sum = decay * self._sum + mismatch * tokens
        self._tokens = decay * self._tokens + tokens
        average = self._sum / self._tokens
        if self._tokens < MIN_TOKENS:
            return
        if average > self._bound:
            raise MismatchTooHigh(
                f"{self._describe(average)} That is above trainer.max_mismatch {self._bound:g}: the run would learn "
                "from wrong probabilities. The parameters are as before this update. Fix the cause. Raise "
                "trainer.max_mismatch only if the difference is intended."
            )

    @property
    def description(self) -> str:
        """What the average is, what was expected, and likely causes."""
        return self._describe(self._sum / max(1.0, self._tokens))

    def _describe(self, average: float) -> str:
        trainer, *generators = self._dtypes
        return (
            f"Trainer and generators differ by {average:.2g} nats per token in the logprobs of the same tokens under "
            f"the same weights; expected at most {self._expected:g} for {trainer} in the trainer and "
            f"{' and '.join(map(str, generators))} in the generators. Likely causes: position encodings that depend on "
            "a length (rope scaling, generator.max_model_len), generator.dtype, quantization or a quantized KV cache, "
            "engine options that change logits, attention kernels, or a model whose code differs between transformers "
            "and vLLM."
        )
