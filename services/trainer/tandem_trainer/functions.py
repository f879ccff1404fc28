"""The former place of the decorator in `tandem_rollout.rewards`. It keeps working for projects that use it."""

from __future__ import annotations

from tandem_rollout.rewards import sandboxed

__all__ = ["sandboxed"]
