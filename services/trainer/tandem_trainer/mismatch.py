"""Whether trainer and generators give the same tokens the same probabilities.

They should, up to the rounding of their dtypes, wherever the weights are the same. Position encodings, kernels,
quantization or weights that did not arrive are what makes them differ. Training would then be biased without a sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .config import TrainerConfig
from .errors import MismatchTooHigh
from .rollouts import UNSHAPED

EXPECTED_FLOAT32, EXPECTED_16_BIT = 1e-3, 0.05
"""Nats per token that rounding explains, with float32 on both sides and otherwise (docs/reference/measured.md)."""
DECAY = 0.8
"""Of the moving average, per update."""
MIN_TOKENS = 32
"""Fewer are not judged."""


class MismatchCheck:
    """Judges a moving average of |trainer's logprob − sampler's logprob|, in nats per token.

    Only tokens that the current weights sampled count. An older policy gives other probabilities by right.
    """

    def __init__(self, config: TrainerConfig, dtypes: Iterable[str | None], alert: Callable[[str], object]) -> None:
        """
        Args:
            dtypes: of the generators' engines; None for one whose logprobs are not the model's (the mock).
            alert: called with a message once the average is higher than the dtypes explain.
        """
        self._bound, self._alert = config.max_mismatch, alert
        self._dtypes = (config.learner.dtype, *dict.fromkeys(dtypes))
        exact = set(self._dtypes) == {"float32"}
        self._expected = EXPECTED_FLOAT32 if exact else EXPECTED_16_BIT
        is_reshaped = any(getattr(config.rollout, name) != value for name, value in UNSHAPED.items())
        self._is_on = None not in self._dtypes and not is_reshaped
        self._sum = self._tokens = 0.0
        self._is_high = False

    def update(self, mismatch: float, tokens: float) -> None:
        """Take in the mean over `tokens` tokens of one update.

        Raises:
            MismatchTooHigh: the average is above `trainer.max_mismatch`.
        """
        if not self._is_on or not tokens:
            return
        decay = DECAY if self._tokens >= MIN_TOKENS else 1.0  # or short completions would never be enough
        self._sum = decay * self._sum + mismatch * tokens
        self._tokens = decay * self._tokens + tokens
        average = self._sum / self._tokens
        if self._tokens < MIN_TOKENS:
            return
        if average > self._bound:
            raise MismatchTooHigh(
                f"{self._describe(average)} That is above trainer.max_mismatch {self._bound:g}: the run would learn "
                "from wrong probabilities. The parameters are as before this update. Raise trainer.max_mismatch only "
                "if you know the cause."
            )
        if average > self._expected and not self._is_high:
            self._alert(f"{self._describe(average)} Training goes on up to trainer.max_mismatch {self._bound:g}.")
        self._is_high = average > self._expected

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
