"""What a TRL script takes from the configuration: where the generators, the weights and the run's files are, and the
deadlines. The script itself sets everything else.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from .alerts import AlertsConfig
from .generator import GeneratorConfig
from .rollout import RolloutConfig
from .sections import Section, SharedConfig
from .trainer import PublishConfig


class TrlTrainerConfig(Section, extra="ignore"):
    """The keys of the section `trainer` that also apply to a TRL script."""

    publish: PublishConfig = Field(default_factory=PublishConfig)
    """How new weights are published."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Only the deadlines are used."""
    start_timeout_s: float = Field(0.0, ge=0.0)
    """How long to wait for the generators at least. The script's `vllm_server_timeout` may be longer."""
    alerts: AlertsConfig | None = Field(default_factory=AlertsConfig)
    """Limits of the alerts that a run raises about its own figures. `null`: no alerts."""
    output_dir: Path = Path("runs")
    """Folder of all runs."""
    run_name: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """Name of the run and of its folder. None: the name of the script."""


class TrlSettings(Section):
    """The sections of the configuration that a TRL script reads."""

    shared: SharedConfig
    """Generators and weight store."""
    trainer: TrlTrainerConfig = Field(default_factory=TrlTrainerConfig)
    """Deadlines, and the run's folder."""


class ScriptSettings(Section):
    """All sections of tandem.yaml, the optional file beside a TRL script."""

    shared: SharedConfig
    """Generators and weight store."""
    generator: GeneratorConfig = GeneratorConfig()
    """The generators that are started for the script."""
    trainer: TrlTrainerConfig = Field(default_factory=TrlTrainerConfig)
    """Deadlines, and the run's folder."""


THE_SCRIPTS = {"shared.model": "the script's"}
"""Stands for the model until the script has said which it is. `load` takes it as `defaults`."""
