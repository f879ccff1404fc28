"""Settings of a complete project, for tools that need the sections of both services."""

from __future__ import annotations

from .generator import GeneratorConfig
from .sections import Section, SharedConfig
from .trainer import TrainerConfig


class ProjectSettings(Section):
    """All sections of config.yaml."""

    shared: SharedConfig
    generator: GeneratorConfig = GeneratorConfig()
    trainer: TrainerConfig
