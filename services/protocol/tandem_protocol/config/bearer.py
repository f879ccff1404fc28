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
ENVIRONMENT_TOKEN_ENV = "TANDEM_ENVIRONMENT_TOKEN"
"""Environment variable with the token of the environment servers. They must not know that of the generators."""
ENVIRONMENT_TOKEN_FILE_ENV = "TANDEM_ENVIRONMENT_TOKEN_FILE"
"""Environment variable with the path of a file that contains the token of the environment servers."""


def read_token(
    env: Mapping[str, str] | None = None, *, variable: str = TOKEN_ENV, file_variable: str = TOKEN_FILE_ENV
) -> str | None:
    """Read a token from the file in `TANDEM_TOKEN_FILE`, or from `TANDEM_TOKEN`.

    Args:
        env: Environment variables. None: those of this process.
        variable: The variable with the token.
        file_variable: The variable with the path of a file with the token.

    Returns:
        The token. None if neither variable is set.

    Raises:
        ConfigError: The file cannot be read, or the token is not one word of printable ASCII.
    """
    env = os.environ if env is None else env
    if file := env.get(file_variable):
        try:
            token = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(
                f"{file_variable}={file} cannot be read: {reason}. Fix: set it to a file with the token that "
                "this user may read."
            ) from error
        where = f"the file that {file_variable} names"
    elif variable in env:
        token = env[variable].strip()
        where = variable
    else:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where} holds no usable token; expected one word of printable ASCII")
    return remember(token)


def read_environment_token(env: Mapping[str, str] | None = None) -> str | None:
    """Read the token of the environment servers, as `read_token` reads that of the generators.

    Raises:
        ConfigError: The file cannot be read, or the token is not one word of printable ASCII.
    """
    return read_token(env, variable=ENVIRONMENT_TOKEN_ENV, file_variable=ENVIRONMENT_TOKEN_FILE_ENV)


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
