"""Environments of other libraries. Each adapter needs its library, which is an extra of this package."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import UserError


def load_library(name: str, module: str) -> Any:
    """Import a module of a library that an adapter needs.

    Raises:
        UserError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name:
            raise
        raise UserError(
            f'the adapter needs {name}, which is not installed. Fix: pip install "tandem-rollout[{name}]", or add '
            f"{name} to the project's requirements.txt."
        ) from error
