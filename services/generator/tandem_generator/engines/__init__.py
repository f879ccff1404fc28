"""Inference engines behind one interface (base.py): vLLM, and a mock that needs no model."""
