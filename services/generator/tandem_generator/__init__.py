"""The generation server: one wire contract over vLLM or a mock."""
