"""A TRL script, with the options of `tandem run`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tandem_protocol.config import ENV_PREFIX, ConfigError, load
from tandem_protocol.config.trl import THE_SCRIPTS, ScriptSettings
from tandem_protocol.device_sets import check_disjoint, parse_devices
from tandem_protocol.script import SETTINGS_FILE, ScriptNeeds, run_name

from .gpu_inventory import DevicesUnknown, gpu_uuids
from .project import EngineName
from .run_folder import RunFolder

START_TIMEOUT_S = 900.0
"""How long the generator may take to start, unless tandem.yaml has trainer.start_timeout_s."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs of both services. Empty: all that there are."""

    generator: tuple[str, ...] = ()
    trainer: tuple[str, ...] = ()

    @classmethod
    def read(cls, generator: str | None, trainer: str | None) -> Gpus:
        """Read the options. Without any, on a host with several GPUs, each service gets one.

        Raises:
            ConfigError: an option is not a list of devices, only one option is given, or both name the same device.
        """
        if generator is None and trainer is None:
            try:
                found = tuple(gpu_uuids())
            except DevicesUnknown:
                found = ()
            return cls(found[:1], found[1:2]) if len(found) > 1 else cls()
        if not generator or not trainer:
            raise ConfigError(
                "got the GPUs of one service, expected both --generator-gpus and --trainer-gpus, or neither"
            )
        devices = cls(parse_devices(generator), parse_devices(trainer))
        fix = "change --generator-gpus or --trainer-gpus"
        check_disjoint(devices.generator, devices.trainer, kind="GPUs", fix=fix)
        return devices


@dataclass(frozen=True)
class Script:
    """A script with its arguments, and what Tandem is configured to do for it."""

    path: Path
    arguments: tuple[str, ...]
    config: Path | None
    """tandem.yaml, if there is one."""
    overrides: Mapping[str, str]
    """Dotted key → text, as given on the command line."""
    settings: ScriptSettings
    sources: Mapping[str, str]
    """Dotted key → source, for the keys that are set."""
    processes: int
    gpus: Gpus

    @classmethod
    def read(
        cls,
        path: Path,
        arguments: Sequence[str],
        *,
        config: Path | None = None,
        overrides: Mapping[str, str] | None = None,
        processes: int | None = None,
        gpus: Gpus = Gpus(),
    ) -> Script:
        """Find the script and its tandem.yaml.

        Args:
            config: None: tandem.yaml beside the script, if there is one.
            processes: number of trainer processes. None: one per GPU of the trainer.

        Raises:
            ConfigError: the script does not exist, or a setting is not valid.
        """
        if not path.is_file():
            raise ConfigError(f"got {path}, expected the file of a TRL script. Fix: check its path")
        beside = path.parent / SETTINGS_FILE
        file = config or (beside if beside.is_file() else None)
        settings, sources = load(ScriptSettings, path=file, overrides=overrides, defaults=THE_SCRIPTS)
        if processes is not None and processes < 1:
            raise ConfigError(f"got --processes {processes}, expected 1 or more")
        return cls(
            path, tuple(arguments), file, overrides or {}, settings, sources, processes or len(gpus.trainer) or 1, gpus
        )

    @property
    def model(self) -> str | None:
        """The model that the settings name; None: the script says it."""
        model = self.settings.shared.model
        return None if model == THE_SCRIPTS["shared.model"] else model

    @property
    def engine(self) -> EngineName:
        return self.settings.generator.engine

    @property
    def run(self) -> RunFolder:
        trainer = self.settings.trainer
        return RunFolder((trainer.output_dir / (trainer.run_name or run_name(self.path))).absolute())

    @property
    def has_preparation(self) -> bool:
        """Whether there is a prepare.py beside tandem.yaml. Without tandem.yaml, such a file is not for Tandem."""
        return self.config is not None and (self.path.parent / "prepare.py").is_file()

    @property
    def start_timeout_s(self) -> float:
        return self.settings.trainer.start_timeout_s or START_TIMEOUT_S

    @property
    def command(self) -> str:
        """The script and its arguments, as a shell reads them."""
        return shlex.join([str(self.path), *self.arguments])

    def environment(self, needs: ScriptNeeds | None = None) -> dict[str, str]:
        """Return the overrides as environment variables, and what the script needs where nothing else is set."""
        keys = {key: f"{value}" for key, value in (needs.keys if needs else {}).items() if not self._is_set(key)}
        return {ENV_PREFIX + key.replace(".", "__").upper(): text for key, text in {**keys, **self.overrides}.items()}

    def _is_set(self, key: str) -> bool:
        if key == "shared.revision" and self.model:
            return True  # it is that of another model
        return key in self.sources and not (key == "shared.model" and self.model is None)


def with_mock(script: Script) -> Script:
    """Return the script with the mock engine."""
    generator = script.settings.generator.model_copy(update={"engine": "mock"})
    settings = script.settings.model_copy(update={"generator": generator})
    return replace(script, settings=settings, overrides={**script.overrides, "generator.engine": "mock"})
