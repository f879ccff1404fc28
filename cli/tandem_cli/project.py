"""A project: the folder with config.yaml, rewards.py and prompts that a person brings, and the folder of its run."""

from __future__ import annotations

import fcntl
import importlib.util
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tandem_protocol.config import ConfigError, load
from tandem_protocol.folders import require_writable

EngineName = Literal["vllm", "mock"]

_MEMORY = Path("/dev/shm")  # noqa: S108 – the weight store's own directory in it is made by mkdtemp
_STORE_TO_MODEL = 8
"""Bytes of the weight store per byte of the model: up to four versions at once, in fp32 where the model is bf16."""


class _Part(BaseModel):
    """The keys of a section that the command line needs; their owners check the whole section."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class SharedPart(_Part):
    model: str


class GeneratorPart(_Part):
    engine: EngineName = "vllm"
    port: int = 8000
    shutdown_timeout_s: int = 30


class TrainerPart(_Part):
    output_dir: Path = Path("runs")
    run_name: str = Field("default", pattern=r"^\w[\w.-]*$")
    max_steps: int
    start_timeout_s: float = 900.0


class Settings(_Part):
    shared: SharedPart
    generator: GeneratorPart
    trainer: TrainerPart


@dataclass(frozen=True)
class Project:
    """A project as one command line sees it."""

    folder: Path
    settings: Settings
    overrides: Mapping[str, str]
    """Dotted key → words, as the command line has them: only `load` reads them, here and in the services."""

    @classmethod
    def read(cls, folder: Path, overrides: Mapping[str, str]) -> Project:
        """Read `folder`/config.yaml.

        Raises:
            ConfigError: there is none, or it (or an override) does not hold what the command line needs.
        """
        config = folder / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"{config} does not exist; expected a project: a folder with config.yaml in it")
        settings, _ = load(Settings, path=config, overrides=overrides)
        return cls(folder.resolve(), settings, overrides)

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def overrides_for(self, section: str) -> list[str]:
        """The overrides that the owner of `section` reads, as its arguments."""
        return [
            f"--{key}={words}" for key, words in self.overrides.items() if key.split(".", 1)[0] in ("shared", section)
        ]

    @property
    def run_dir(self) -> Path:
        return self.folder / self.settings.trainer.output_dir / self.settings.trainer.run_name

    @property
    def logs_dir(self) -> Path:
        return self.run_dir / "logs"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only demo that writes the run; the kernel's lock goes when its process does, however it ends.

        Raises:
            ConfigError: another demo holds it, or there can be no run.
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
        """Rename the run's folder, if there is one, to the first free of `name.1`, `name.2` …, and say which."""
        if not self.run_dir.exists():
            return None
        names = (self.run_dir.with_name(f"{self.run_dir.name}.{n}") for n in itertools.count(1))
        return self.run_dir.rename(next(name for name in names if not name.exists()))

    @contextmanager
    def weights_dir(self) -> Iterator[Path]:
        """A directory for the weight store, removed afterwards: in memory if the model's size is known and fits."""
        size_bytes = sum(s.stat().st_size for s in (self.folder / self.settings.shared.model).glob("*.safetensors"))
        room_bytes = shutil.disk_usage(_MEMORY).free if os.access(_MEMORY, os.W_OK) else 0
        in_memory = 0 < size_bytes * _STORE_TO_MODEL <= room_bytes
        with tempfile.TemporaryDirectory(
            prefix="tandem-weights-", dir=_MEMORY if in_memory else self.run_dir, ignore_cleanup_errors=True
        ) as directory:
            yield Path(directory)


def choose_engine(wanted: EngineName) -> tuple[EngineName, str | None]:
    """The engine to use and, if it is not the one that was wanted, why."""
    if wanted == "vllm" and importlib.util.find_spec("vllm") is None:
        return "mock", (
            "vLLM is not installed beside this Python, so the mock engine stands in: every part of the loop runs, "
            "but its tokens do not come from the model and the reward will not rise. `make setup` installs vLLM "
            "where there is a build for this machine."
        )
    return wanted, None
