"""The command line alone is small. What only one command needs is an extra of the package, or one of the services."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from tandem_protocol.config import ConfigError


def require(command: str, extra: str, *, libraries: Sequence[str], services: Sequence[str] = ()) -> None:
    """Check that a command's libraries are installed, without importing them.

    Args:
        command: the command that needs them, for the message.
        extra: the extra of tandem-cli that installs `libraries`.
        services: packages of Tandem that it needs, too.

    Raises:
        ConfigError: something is missing.
    """
    missing = [name for name in (*libraries, *services) if find_spec(name) is None]
    if not missing:
        return
    fix = f'pip install "tandem-cli[{extra}]"'
    if set(missing) & set(services):
        fix = (
            "run `make setup` in a checkout of Tandem, which installs everything into its .venv, and use that `tandem`"
        )
    raise ConfigError(
        f"got an installation without {', '.join(missing)}, expected what {command} needs: the extra [{extra}] of "
        f"tandem-cli{' and the services' if services else ''}. Fix: {fix}"
    )
