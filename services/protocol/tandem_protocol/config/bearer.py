"""The bearer token: read it, and check a request. It is a secret, so it is not part of the configuration file."""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from ..secrets import remember
from .sections import ConfigError

TOKEN_ENV = "TANDEM_TOKEN"
"""Environment variable with the token."""
TOKEN_FILE_ENV = "TANDEM_TOKEN_FILE"
"""Environment variable with the path of a file that contains the token."""


def read_token(env: Mapping[str, str] | None = None) -> str | None:
    """Read the token from the file in `TANDEM_TOKEN_FILE`, or from `TANDEM_TOKEN`.

    Args:
        env: Environment variables. None: those of this process.

    Returns:
        The token. None if neither variable is set.

    Raises:
        ConfigError: The file cannot be read, or the token is not one word of printable ASCII.
    """
    env = os.environ if env is None else env
    if file := env.get(TOKEN_FILE_ENV):
        try:
            token = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(
                f"{TOKEN_FILE_ENV}={file} cannot be read: {reason}. Fix: set it to a file with the token that "
                "this user may read."
            ) from error
        where = f"the file that {TOKEN_FILE_ENV} names"
    elif TOKEN_ENV in env:
        token = env[TOKEN_ENV].strip()
        where = TOKEN_ENV
    else:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where} holds no usable token; expected one word of printable ASCII")
    return remember(token)


def is_authorized(header: str, token: str) -> bool:
    """Whether the value of an `Authorization` header carries `token`. The scheme's case does not matter (RFC 9110).

    With the scheme Basic, the token is the password of any user. So a URL can hold it: `http://tandem:TOKEN@host:8000`.
    """
    scheme, _, given = header.partition(" ")
    found = given.strip().encode()
    if scheme.lower() == "basic":
        try:
            found = base64.b64decode(found, validate=True).partition(b":")[2]
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(found, token.encode())
