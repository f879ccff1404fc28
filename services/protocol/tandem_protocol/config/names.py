"""Settings whose value is a name that Tandem knows, or that of a function or class of the user's project."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from ..problems import shorten
from .sections import FUNCTION_NAME

ProjectName = Annotated[str, Field(pattern=FUNCTION_NAME)]
"""`module:name`, in the project's folder or in an installed package."""


def known_or_of_project(known: Any) -> BeforeValidator:
    """Accept the names in the Literal `known` and every `module:name`. A typo is refused with the nearest name."""
    names = get_args(known)

    def check(value: Any) -> Any:
        if value in names or (isinstance(value, str) and re.match(FUNCTION_NAME, value)):
            return value
        near = difflib.get_close_matches(str(value).lower(), names, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Fix: correct the name."
        raise ValueError(f"got {shorten(value)}, expected {', '.join(names)}, or module:name of the project. {hint}")

    return BeforeValidator(check)


def is_of_project(name: str) -> bool:
    """Whether `name` is that of a function or class of the project."""
    return ":" in name
