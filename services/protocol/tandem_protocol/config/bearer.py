"""The bearer token, which is a secret and so not a key of the configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .sections import ConfigError

TOKEN_ENV = "TANDEM_TOKEN"
TOKEN_FILE_ENV = "TANDEM_TOKEN_FILE"


def read_token(env: Mapping[str, str] | None = None) -> str | None:
    """From the file that TANDEM_TOKEN_FILE names, or from TANDEM_TOKEN; None when neither is set.

    Raises:
        ConfigError: the file cannot be read, or the token is not one printable ASCII word.
    """
    env = os.environ if env is None else env
    if file := env.get(TOKEN_FILE_ENV):
        try:
            token = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(
                f"{TOKEN_FILE_ENV}={file} cannot be read: {reason}. Fix: name a file with the token that this user "
                "may read."
            ) from error
        where = f"the file that {TOKEN_FILE_ENV} names"
    elif TOKEN_ENV in env:
        token, where = env[TOKEN_ENV].strip(), TOKEN_ENV
    else:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where} holds no usable token; expected one word of printable ASCII")
    return token
