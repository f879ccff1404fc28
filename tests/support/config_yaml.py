"""A configuration with fields of every kind, and functions that read it from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from tandem_protocol.config import ConfigError, Section, load


class Optim(Section):
    learning_rate: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.999)


class Reward(Section):
    function: str
    weight: float = 1.0
    arguments: dict[str, Any] = {}


class Trainer(Section):
    run_name: str = "default"
    max_steps: int = 1
    limit: int | None = None
    shuffle: bool = True
    temperature: float = 1.0
    output_dir: Path = Path("runs")
    mode: Literal["on", "off"] = "on"
    names: tuple[str, ...] = ()
    optim: Optim = Optim()
    eval: Optim | None = None
    rewards: tuple[Reward, ...] = ()
    arguments: dict[str, Any] = {}
    env: dict[str, str] = {}


class Settings(Section):
    trainer: Trainer = Trainer()


def read(tmp_path: Path, text: str) -> Trainer:
    """Read `text` as the body of the section `trainer`."""
    return read_file(tmp_path, "trainer:\n" + "".join(f"  {line}\n" for line in text.splitlines()))


def read_file(tmp_path: Path, text: str, **more: Any) -> Trainer:
    """Read `text` as a complete `config.yaml`. `more` are arguments of `load`."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load(Settings, path=path, **({"env": {}} | more))[0].trainer


def refusal(tmp_path: Path, text: str) -> str:
    """Return the error message for `text` as the body of the section `trainer`."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return str(caught.value)


AMBIGUOUS_WORDS = [
    "on", "off", "yes", "No", "true", "False", "007", "42", "-1", "1e5", "1.", ".5", "0x10", "0o7", "1:30", "1_000",
    "2026-11-25", "2026-11-25 10:00:00", ".inf", ".nan", "null", "~",
]  # fmt: skip
"""Words that, without quotes, some version of YAML does not read as text."""
