"""A TRL script: what it needs of its generators, and how whoever starts them learns it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .config import ConfigError

SCRIPT_ENV = "TANDEM_SCRIPT"
"""Environment variable with the command line of a script: its file, and its arguments."""
NEEDS_ENV = "TANDEM_SCRIPT_NEEDS"
"""Environment variable with the path of the file to which a script writes what it needs."""
SETTINGS_FILE = "tandem.yaml"
"""Optional file beside a script, with the sections `shared`, `generator` and `trainer`."""


class ScriptNeeds(NamedTuple):
    """What the generators of a script must be. A script knows it when it makes its trainer."""

    model: str
    """An absolute folder, or a name on the hub."""
    revision: str | None = None
    """Commit on the hub."""
    trust_remote_code: bool = False
    max_model_len: int | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """Dotted configuration key → value. Values that the script leaves open are missing."""
        keys = {
            "shared.model": self.model,
            "shared.revision": self.revision,
            "shared.trust_remote_code": self.trust_remote_code or None,
            "generator.max_model_len": self.max_model_len,
        }
        return {key: value for key, value in keys.items() if value is not None}

    def write(self, file: Path) -> None:
        """Write them. A reader sees all of it or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        temporary = file.with_name(f".{file.name}.new")
        temporary.write_text(json.dumps(self._asdict()))
        temporary.replace(file)

    @classmethod
    def read(cls, file: Path) -> ScriptNeeds | None:
        """Read what `write` wrote. None if there is nothing yet."""
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None


def script_command(env: Mapping[str, str] = os.environ) -> list[str]:
    """Return the words of `TANDEM_SCRIPT`: the script and its arguments. Empty without a script.

    Raises:
        ConfigError: a quotation mark is not closed.
    """
    text = env.get(SCRIPT_ENV, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"got {SCRIPT_ENV}={text}, expected a command line: {error}. Fix: close it.") from error


def run_name(script: str | Path) -> str:
    """Name of a script's run: that of its file without `.py`, with `_` for characters that a run's name cannot have."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(script).stem)
    return re.sub(r"^[.-]", "_", name)
