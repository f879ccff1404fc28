"""The name of a policy version, such as `42.1`: an optimizer step, and the attempt of the trainer that computed it."""

from __future__ import annotations

import re
from functools import total_ordering
from typing import Any, NamedTuple

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_PATTERN = re.compile(r"([0-9]+)\.([0-9]+)")


@total_ordering
class Version(NamedTuple):
    """The policy after `step` optimizer steps, computed in attempt number `attempt`. Written `42.2`.

    An attempt is one start of the trainer. A resumed trainer may compute step 42 again, with another result, so the
    step alone does not identify a policy.

    Versions are ordered by attempt first: `40.2` is newer than `42.1`. Within an attempt, the larger step is newer.
    """

    step: int
    """Number of optimizer steps."""
    attempt: int
    """Number of the trainer's start. It begins at 1. Only the base weights have 0."""

    @classmethod
    def parse(cls, text: str) -> Version:
        """Parse a version, such as `42.1`.

        Raises:
            ValueError: `text` does not have the form `step.attempt`.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"got version {text!r}, expected step.attempt, such as 42.1")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.step}.{self.attempt}"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Version):
            return NotImplemented
        return (self.attempt, self.step) < (other.attempt, other.step)

    # NamedTuple compares (step, attempt), and total_ordering does not replace inherited methods.
    def __gt__(self, other: object) -> bool:
        return isinstance(other, Version) and other < self

    def __le__(self, other: object) -> bool:
        return not self > other

    def __ge__(self, other: object) -> bool:
        return not self < other

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> Version:
            if isinstance(value, Version):
                return value
            if not isinstance(value, str):  # the number 42.10 equals 42.1, but the versions differ
                raise ValueError(f"got version {value!r}, expected step.attempt as text, such as '42.1'")
            return cls.parse(value)

        return core_schema.no_info_plain_validator_function(
            validate,
            serialization=core_schema.plain_serializer_function_ser_schema(str, return_schema=core_schema.str_schema()),
            json_schema_input_schema=core_schema.str_schema(pattern=_PATTERN.pattern),
        )


BASE = Version(0, 0)
"""The base weights, which a generator loads from `shared.model`. Older than every published version."""
