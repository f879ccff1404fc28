"""Paths of the wire contract. Generator and client both use these constants."""

HEALTHZ = "/healthz"
"""GET: the process is alive."""
READYZ = "/readyz"
"""GET: status 200 if the generator answers rollout requests, else 503."""
METRICS = "/metrics"
"""GET: metrics in the Prometheus text format."""
INFO = "/info"
"""GET: what the generator is and serves."""
PARAMETERS = "/parameters"
"""GET: names and shapes of the model's parameters."""
ROLLOUTS = "/rollouts"
"""POST: sample completions."""
WEIGHTS = "/weights"
"""GET: which version is served."""
SET_WEIGHTS = "/weights/{version}"
"""PUT: serve this version."""

VLLM_HEALTH = "/health"
"""GET: vLLM's name of `HEALTHZ`. Clients of vLLM, such as TRL's, ask here first, without a token."""

OPEN = frozenset({HEALTHZ, READYZ, VLLM_HEALTH})
"""Paths that need no token. Probes cannot send one, and the answers reveal only the state."""
