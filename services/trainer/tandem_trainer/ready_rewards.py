"""The former name of `tandem_rollout.rewards`. It keeps working for projects that use it."""

from __future__ import annotations

from tandem_rollout.rewards import exact_match, math_answer, regex_match, soft_overlong_punishment

__all__ = ["exact_match", "math_answer", "regex_match", "soft_overlong_punishment"]
