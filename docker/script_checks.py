"""Prepare a TRL script: find out which model its generators need, download what it reads, and write their settings."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from commands import CommandFailed, run_shown
from project_checks import ERROR_LINE

from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.reading import read_file
from tandem_protocol.config.trl import THE_SCRIPTS, ScriptSettings
from tandem_protocol.config.writing import to_yaml
from tandem_protocol.processes import USER_ERROR
from tandem_protocol.script import NEEDS_ENV, SETTINGS_FILE, ScriptNeeds

log = logging.getLogger("tandem_preflight")

CONFIG = ".tandem-config.yaml"
"""On the project volume: the settings of the services. compose.yaml and the chart name it too."""


def prepare_script(project: Path, script: Sequence[str]) -> None:
    """Write the settings of the services.

    If tandem.yaml does not name a model, the script is rehearsed: it runs until it has made its trainer. This also
    downloads the model and the data sets that it loads, since the services have no network to the outside.

    Args:
        script: its file, and its arguments.

    Raises:
        ConfigError: a setting is wrong, or the script asks for something that is not supported.
        CommandFailed: prepare.py or the script failed.
    """
    config = project / SETTINGS_FILE
    has_config = config.is_file()
    path = config if has_config else None
    check(path)
    if not (project / script[0]).is_file():
        raise ConfigError(
            f"got the script {script[0]}, which is not in the project's folder. Fix: set TANDEM_PROJECT to its folder, "
            "and TANDEM_SCRIPT to its name and arguments."
        )
    if has_config and (project / "prepare.py").exists():
        log.info("preparing the project with its prepare.py")
        run_shown("prepare.py", [sys.executable, "prepare.py"], project)
    sources = check(path)
    needs = None if "shared.model" in sources else rehearse(project, script)
    write_config(project, path, needs, sources)


def check(path: Path | None) -> set[str]:
    """Check tandem.yaml, and return the dotted keys that are set, there or in the environment.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    _, sources = load(ScriptSettings, path=path, defaults=THE_SCRIPTS)
    return {key for key, source in sources.items() if source != "default of the caller"}


def rehearse(project: Path, script: Sequence[str]) -> ScriptNeeds:
    """Run the script until it has made its trainer, and return what its generators must be.

    Raises:
        ConfigError: the script asks for something that is not supported.
        CommandFailed: the script failed.
    """
    log.info("rehearsing %s until it has made its trainer", script[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "needs.json"
        command = [sys.executable, "-m", "tandem_trainer.trl", "--rehearse", *script]
        try:
            run_shown("the rehearsal of the script", command, project, TANDEM_LOG="text", **{NEEDS_ENV: str(file)})
        except CommandFailed as error:
            if error.status != USER_ERROR or not any(map(ERROR_LINE.match, error.lines)):
                raise
            raise ConfigError(ERROR_LINE.split("\n".join(error.lines))[-1]) from error
        needs = ScriptNeeds.read(file)
    assert needs is not None, "a rehearsal that succeeds has written them"
    return needs


def write_config(project: Path, path: Path | None, needs: ScriptNeeds | None, given: set[str]) -> None:
    """Write tandem.yaml, with what the script needs where nothing else is set.

    Raises:
        OSError: the file cannot be written.
    """
    tree = read_file(path) if path else {}
    for key, value in (needs.keys if needs else {}).items():
        section, name = key.split(".")
        if key not in given:
            tree[section] = {**(tree.get(section) or {}), name: value}
    temporary = project / f"{CONFIG}.new"
    temporary.write_text(to_yaml(tree))
    temporary.replace(project / CONFIG)
