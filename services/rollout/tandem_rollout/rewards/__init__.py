"""What a project's rewards may use: ready-made functions, and the decorator `sandboxed`.

Example: `function: tandem_rollout.rewards:exact_match`. The other modules call and isolate reward functions.
"""

from __future__ import annotations

from ..functions import sandboxed
from .ready import exact_match, math_answer, regex_match, soft_overlong_punishment

__all__ = ["exact_match", "math_answer", "regex_match", "sandboxed", "soft_overlong_punishment"]
