"""How a run's folder says what became of the run: the last phase in `status.json`, and the lock of its trainer."""

from __future__ import annotations

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""The final phases of `status.json`."""
LOCK_FILE = "LOCK"
"""File in the run's folder that names the trainer at work there, which holds a lock on it."""
