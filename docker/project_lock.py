"""One Compose project trains one project, whose files do not change while services use them.

Under Compose, generator and trainer hold a lock on the project's volume as long as they run (TANDEM_PROJECT_LOCK).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from project_files import changes, is_free_for

from tandem_protocol.config import ConfigError
from tandem_protocol.lock import PROJECT_LOCK_ENV, Held, exclusive, is_held, shared
from tandem_protocol.problems import first_few

_held = ExitStack()
"""Keeps the lock until this process ends."""


def claim(
    project: Path, sources: Sequence[Path], identity: str, env: Mapping[str, str] = os.environ, held: ExitStack = _held
) -> bool:
    """Lock the volume `project`, if the environment names a lock.

    Returns:
        False if services are running with exactly the files that `sources` have, so that there is nothing to do.

    Raises:
        ConfigError: the volume belongs to another project, services are running with other files, or another preflight
            is at work.
    """
    if not (lock := env.get(PROJECT_LOCK_ENV)):
        return True
    file, name, stack = Path(lock), env.get("TANDEM_PROJECT", identity), env.get("COMPOSE_PROJECT_NAME", "NAME")
    if not is_free_for(project, identity):
        raise ConfigError(
            f"got the project {name}, but the Compose project {stack} belongs to {_holder(file)}. Fix: give {name} a "
            "name of its own, `docker compose --project-name OTHER up --build`, or remove the other project with its "
            f"results, `docker compose --project-name {stack} --profile '*' down --volumes`"
        )
    try:
        held.enter_context(exclusive(file, name))
    except Held as error:
        _check_unchanged(project, sources, f"{error}", stack, file)
        return False
    return True


def is_in_use(env: Mapping[str, str] = os.environ) -> bool:
    """Whether services or another preflight hold the lock."""
    lock = env.get(PROJECT_LOCK_ENV)
    return bool(lock and is_held(Path(lock)))


def _holder(lock: Path) -> str:
    """The project that the last preflight prepared."""
    return (lock.read_text().strip() if lock.exists() else "") or "another project"


def _check_unchanged(project: Path, sources: Sequence[Path], name: str, stack: str, lock: Path) -> None:
    """Check that the services run with the files that `sources` have.

    Raises:
        ConfigError: they do not, or another preflight holds the lock.
    """
    try:
        with shared(lock):
            pass
    except Held as error:
        raise ConfigError(f"{name} is being prepared by another preflight. Fix: wait until it has ended") from error
    if changed := changes(project, sources):
        raise ConfigError(
            f"got changes in {first_few(changed)}, but the services of {stack} are running with the files from before. "
            f"Fix: restart them to use the changes: `docker compose --project-name {stack} stop` (the trainer writes a "
            "checkpoint), then the same command again"
        )
