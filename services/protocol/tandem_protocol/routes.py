"""The paths of the wire contract, for both of its ends."""

HEALTHZ = "/healthz"
READYZ = "/readyz"
METRICS = "/metrics"
INFO = "/info"
PARAMETERS = "/parameters"
ROLLOUTS = "/rollouts"
WEIGHTS = "/weights"
SET_WEIGHTS = "/weights/{version}"

OPEN = frozenset({HEALTHZ, READYZ})
"""Answered without a token: a probe carries none, and they tell nothing but the state."""
