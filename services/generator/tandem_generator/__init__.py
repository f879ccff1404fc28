"""The generator: serves rollouts and switches weights, with vLLM or a mock engine."""
