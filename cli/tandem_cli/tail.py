"""Reads JSON Lines files while another process writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

RecordT = TypeVar("RecordT", bound=BaseModel)


class JsonLinesReader(Generic[RecordT]):
    """Reads the records of a growing file. A line is read once it ends with a newline."""

    def __init__(self, path: Path, record: type[RecordT]) -> None:
        self.records: list[RecordT] = []
        self._path = path
        self._record = record
        self._offset = 0

    def poll(self) -> list[RecordT]:
        """Read and return the added records. A file that shrank is read again: a resumed run truncates it."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self.records = []
                    self._offset = 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        added = [record for line in complete.splitlines() for record in self._read(line)]
        self.records += added
        return added

    def _read(self, line: bytes) -> Iterator[RecordT]:
        """Yield the record of a line. A line that is not JSON is left out: a killed process has not completed it."""
        try:
            yield self._record.model_validate_json(line)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise
