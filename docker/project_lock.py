"""Keeps the preflight from replacing a project while services use it.

Under Compose, generator and trainer hold a lock on the project's volume as long as they run (TANDEM_PROJECT_LOCK).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from project_files import changes, holds

from tandem_protocol.config import ConfigError
from tandem_protocol.lock import PROJECT_LOCK_ENV, Held, exclusive, shared
from tandem_protocol.requirements import summarize

_held = ExitStack()
"""Keeps the lock until this process ends."""


def claim(
    project: Path, sources: Sequence[Path], identity: str, env: Mapping[str, str] = os.environ, held: ExitStack = _held
) -> bool:
    """Lock the volume `project`, if the environment names a lock.

    Returns:
        False if services are running with exactly the files that `sources` have, so that there is nothing to do.

    Raises:
        ConfigError: services are running with another project or with other files, or another preflight is at work.
    """
    if not (lock := env.get(PROJECT_LOCK_ENV)):
        return True
    name, stack = env.get("TANDEM_PROJECT", identity), env.get("COMPOSE_PROJECT_NAME", "NAME")
    try:
        held.enter_context(exclusive(Path(lock), name))
    except Held as error:
        _check_same(project, sources, identity, f"{error}", name, stack, Path(lock))
        return False
    return True


def _check_same(
    project: Path, sources: Sequence[Path], identity: str, running: str, name: str, stack: str, lock: Path
) -> None:
    """Check that what runs is what `sources` have.

    Raises:
        ConfigError: it is not.
    """
    stop = f"`docker compose --project-name {stack} stop` (the trainer writes a checkpoint)"
    try:
        with shared(lock):
            pass
    except Held as error:
        raise ConfigError(f"{running} is being prepared by another preflight. Fix: wait until it has ended") from error
    if not holds(project, identity):
        raise ConfigError(
            f"got the project {name}, but {running} is running under the compose project {stack}. Fix: run {name} "
            "beside it under a name of its own, `docker compose --project-name OTHER up --build`, or stop the running "
            f"one first: {stop}"
        )
    if changed := changes(project, sources):
        raise ConfigError(
            f"got changes in {summarize(changed)}, but the services of {stack} are running with the files from before. "
            f"Fix: restart them to use the changes: {stop}, then the same command again"
        )
