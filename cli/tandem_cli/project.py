"""A project (the user's folder with config.yaml, rewards.py and prompts) and the folder of its run."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.project import ProjectSettings
from tandem_protocol.problems import first_few
from tandem_protocol.requirements import has_hashes, missing, requirements_file

from .run_folder import RunFolder

EngineName = Literal["vllm", "mock"]


@dataclass(frozen=True)
class Project:
    """A project, with the overrides of one command line."""

    folder: Path
    settings: ProjectSettings
    overrides: Mapping[str, str]
    """Dotted key → text as given on the command line. `load` parses it, here and in the services."""

    @classmethod
    def read(cls, folder: Path, overrides: Mapping[str, str]) -> Project:
        """Read `folder`/config.yaml.

        Raises:
            ConfigError: the file does not exist, or it or an override is not valid.
        """
        config = folder / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"{config} does not exist, expected a project: a folder with config.yaml in it")
        settings, _ = load(ProjectSettings, path=config, overrides=overrides)
        return cls(folder.resolve(), settings, overrides)

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def require_packages(self) -> None:
        """Check that this Python has the packages of the project's requirements file.

        Raises:
            ConfigError: it does not, or the environment names a file that does not exist.
            OSError: the file cannot be read.
        """
        if (file := requirements_file(self.folder)) and (problems := missing(file)):
            install = [sys.executable, "-m", "pip", "install", *["--no-deps"] * has_hashes(file), "-r", str(file)]
            raise ConfigError(
                f"got a Python without {first_few(problems)}, expected the packages of {file.name}. Fix: "
                f"{shlex.join(install)}"
            )

    def overrides_for(self, section: str) -> list[str]:
        """Return the overrides of `shared` and `section` as command line arguments of the service."""
        return [
            f"--{key}={text}" for key, text in self.overrides.items() if key.split(".", 1)[0] in ("shared", section)
        ]

    @property
    def run_dir(self) -> Path:
        return self.folder / self.settings.trainer.output_dir / self.settings.trainer.run_name

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.run_dir)


def choose_engine(requested: EngineName) -> tuple[EngineName, str | None]:
    """Return the engine to use and, if it differs from the requested one, the reason."""
    if requested == "vllm" and importlib.util.find_spec("vllm") is None:
        return "mock", (
            "vLLM is not installed in this Python environment, so the mock engine takes its place. Every part of the "
            "loop runs, but the tokens do not come from the model and the reward will not rise. Fix: run `make setup`, "
            "which installs vLLM if there is a build for this machine."
        )
    return requested, None
