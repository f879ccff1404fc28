"""What a TRL script takes from the configuration: where the generators and the weights are, and the deadlines.

The script itself sets everything else.
"""

from __future__ import annotations

from pydantic import Field

from .rollout import RolloutConfig
from .sections import Section, SharedConfig
from .trainer import PublishConfig


class TrlDeadlines(Section, extra="ignore"):
    """The keys of the section `trainer` that also apply to a TRL script."""

    publish: PublishConfig = Field(default_factory=PublishConfig)
    """How new weights are published."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Only the deadlines are used."""


class TrlSettings(Section):
    """The sections of the configuration that a TRL script reads."""

    shared: SharedConfig
    """Generators and weight store."""
    trainer: TrlDeadlines = Field(default_factory=TrlDeadlines)
    """Deadlines."""
