"""A project (the user's folder with config.yaml, rewards.py and prompts) and the folder of its run."""

from __future__ import annotations

import fcntl
import importlib.util
import itertools
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.project import ProjectSettings
from tandem_protocol.folders import require_writable
from tandem_protocol.problems import first_few
from tandem_protocol.requirements import has_hashes, missing, requirements_file

EngineName = Literal["vllm", "mock"]

_MEMORY = Path("/dev/shm")  # noqa: S108 – mkdtemp creates the weight store's directory in it
_STORE_TO_MODEL = 8
"""Bytes of the weight store per byte of the model: up to four versions, in fp32 even if the model is bf16."""


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
    def logs_dir(self) -> Path:
        return self.run_dir / "logs"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run, so that no other demo writes it. The kernel releases the lock when this process ends.

        Raises:
            ConfigError: another demo holds the lock, or the run's folder cannot be written to.
        """
        require_writable(self.run_dir.parent, "trainer.output_dir")
        with self.run_dir.with_name(f".{self.run_dir.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"{self.run_dir} is being written by another `tandem demo`. Fix: end it, or give this run another "
                    "name: --trainer.run_name NAME."
                ) from error
            yield

    def set_earlier_run_aside(self) -> Path | None:
        """Rename the run's folder to the first free of `name.1`, `name.2` …, and return it.

        Returns None if the run does not exist.
        """
        if not self.run_dir.exists():
            return None
        names = (self.run_dir.with_name(f"{self.run_dir.name}.{n}") for n in itertools.count(1))
        return self.run_dir.rename(next(name for name in names if not name.exists()))

    @contextmanager
    def weights_dir(self) -> Iterator[Path]:
        """Create a directory for the weight store and remove it afterwards.

        It is in memory if the model is a local folder and memory has room for its versions, else in the run's folder.
        """
        shards = (self.folder / self.settings.shared.model).glob("*.safetensors")
        size_bytes = sum(shard.stat().st_size for shard in shards)
        room_bytes = shutil.disk_usage(_MEMORY).free if os.access(_MEMORY, os.W_OK) else 0
        in_memory = 0 < size_bytes * _STORE_TO_MODEL <= room_bytes
        with tempfile.TemporaryDirectory(
            prefix="tandem-weights-", dir=_MEMORY if in_memory else self.run_dir, ignore_cleanup_errors=True
        ) as directory:
            yield Path(directory)


def choose_engine(requested: EngineName) -> tuple[EngineName, str | None]:
    """Return the engine to use and, if it differs from the requested one, the reason."""
    if requested == "vllm" and importlib.util.find_spec("vllm") is None:
        return "mock", (
            "vLLM is not installed in this Python environment, so the mock engine takes its place. Every part of the "
            "loop runs, but the tokens do not come from the model and the reward will not rise. Fix: run `make setup`, "
            "which installs vLLM if there is a build for this machine."
        )
    return requested, None
