"""Keep secrets out of logs, messages and files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SHORTEST = 8
"""In characters. A shorter secret is not replaced by its value, because it may be a part of any word."""
NAMES = re.compile(r"(token|password|passwd|secret|secret_access_key|api_?key)$", re.IGNORECASE)
"""How the name of a variable or a key ends if its value is a secret."""
HIDDEN = "***"
_USERINFO = re.compile(r'(?<=://)[^\s/?#"]*(?::[^\s"]*)?@')
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_read: set[str] = set()


def mask(text: str, env: Mapping[str, str] = os.environ) -> str:
    """Replace the secrets in `text` by `***`.

    Besides those of `mask_forms`, these are the values of environment variables whose names say that they are secret,
    and what `remember` was called with.
    """
    text = mask_forms(text)
    values = {value.strip() for name, value in env.items() if is_secret(name)} | _read
    for value in sorted(values, key=len, reverse=True):  # one may contain another
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return text


def mask_forms(text: str) -> str:
    """Replace the secrets that have a form of their own: user and password in a URL, and Hugging Face tokens.

    The result depends on `text` only, so values masked at different times can be compared.
    """
    return _HUB_TOKEN.sub(HIDDEN, _USERINFO.sub(f"{HIDDEN}@", text))


def remember(secret: str) -> str:
    """Have `mask` replace a secret that was read from a file. Returns it."""
    _read.add(secret)
    return secret


def is_secret(name: str) -> bool:
    """Whether the value of a key or an environment variable is a secret, by its name."""
    return bool(NAMES.search(name))
