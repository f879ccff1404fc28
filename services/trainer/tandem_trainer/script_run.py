"""A TRL script in the images: where its files are, and the copy of its folder in which it runs."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tandem_protocol.config import load
from tandem_protocol.config.trl import THE_SCRIPTS, TrlSettings
from tandem_protocol.script import run_name, script_command

FOLDER_ENV = "TANDEM_SCRIPT_FOLDER"
"""Environment variable with the folder of the script, which may be read-only. The images set it."""


class Places(NamedTuple):
    """Where a run has its files."""

    run_dir: Path
    weights_dir: Path
    newest_checkpoint: Callable[[], int]
    """The step of the newest checkpoint; -1 without any."""


def places(env: Mapping[str, str], arguments: Sequence[str]) -> Places:
    """Return where the run of the script in `TANDEM_SCRIPT` has its files.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    given, _ = parser.parse_known_args(arguments)
    settings, _ = load(TrlSettings, path=given.config, defaults=THE_SCRIPTS)
    trainer = settings.trainer
    run_dir = trainer.output_dir / (trainer.run_name or run_name(script_command(env)[0]))
    return Places(run_dir, settings.shared.weights_dir, partial(newest_checkpoint, run_dir))


def newest_checkpoint(run_dir: Path) -> int:
    """The highest step of the checkpoints that the script has written into its folder; -1 without any."""
    names = [file.parent.name.removeprefix("checkpoint-") for file in run_dir.rglob("checkpoint-*/trainer_state.json")]
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def enter(env: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Change into a copy of the script's folder. It is the run's folder, where the script can write.

    A file that is newer there stays: it is the script's output, with the name of a file of the project.

    Raises:
        OSError: a file cannot be copied.
    """
    source, run_dir = env.get(FOLDER_ENV), places(env, arguments).run_dir
    if source:
        shutil.copytree(
            source, run_dir, dirs_exist_ok=True, copy_function=_copy_newer, ignore=shutil.ignore_patterns(".*")
        )
        os.chdir(run_dir)


def _copy_newer(source: str, target: str) -> None:
    if not os.path.lexists(target) or Path(source).stat().st_mtime_ns > Path(target).stat().st_mtime_ns:
        shutil.copyfile(source, f"{target}.new")
        shutil.copystat(source, f"{target}.new")
        Path(f"{target}.new").replace(target)  # other nodes may copy it at the same time
