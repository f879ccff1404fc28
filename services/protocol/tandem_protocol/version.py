"""The name of a policy version: which optimizer step, computed by which incarnation of the trainer."""

from __future__ import annotations

import re
from functools import total_ordering
from typing import Any, NamedTuple

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_PATTERN = re.compile(r"([0-9]+)\.([0-9]+)")


@total_ordering
class Version(NamedTuple):
    """The policy after `step` optimizer steps, as the trainer's incarnation `attempt` computed it.

    A trainer that resumes may compute a step again and differently, so a step alone names nothing. A later attempt
    is newer whatever its step; within one attempt the larger step is newer. Written `step.attempt`, e.g. `42.2`.
    """

    step: int
    attempt: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read `step.attempt`.

        Raises:
            ValueError: the text is anything else.
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

    # NamedTuple would compare (step, attempt); total_ordering leaves inherited methods alone, so all four stand here.
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
            if not isinstance(value, str):  # the number 42.10 would be read as 42.1
                raise ValueError(f"got version {value!r}, expected step.attempt as text, such as '42.1'")
            return cls.parse(value)

        return core_schema.no_info_plain_validator_function(
            validate,
            serialization=core_schema.plain_serializer_function_ser_schema(str),
            json_schema_input_schema=core_schema.str_schema(pattern=_PATTERN.pattern),
        )


BASE = Version(0, 0)
"""The weights a generator found at its model path: older than everything a trainer has published."""
