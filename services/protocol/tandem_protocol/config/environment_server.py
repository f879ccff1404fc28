"""Settings of environments that run in a process or container of their own.

The text below a field is its description in docs/reference/config.md.
"""

from __future__ import annotations

from pydantic import Field

from .sections import Section


class EnvironmentServerConfig(Section):
    """How `python -m tandem_rollout.server` serves the project's environment. The trainer does not read it."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs a token."""
    port: int = Field(8100, ge=0, le=65535)
    """Port to listen on."""
    max_sessions: int = Field(1024, ge=1)
    """Episodes that one server holds at the same time. Further ones wait until another episode has ended, or go to
    another replica."""
    idle_timeout_s: float = Field(900.0, gt=0.0)
    """How long a session may stay without a request, in seconds. Then it is discarded. It must be longer than the
    policy takes for a turn."""
    shutdown_timeout_s: int = Field(10, ge=0)
    """How long running requests may take to finish after SIGTERM, in seconds."""
