"""Reads JSON Lines files while another process writes them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from pydantic import BaseModel, ValidationError

RecordT = TypeVar("RecordT", bound=BaseModel)

_MARK_BYTES = 512
"""How much of what was read last is compared, to notice that a file has been written again."""


class GrowingFile:
    """Reads the lines that another process adds to a file. A line is read once it ends with a newline."""

    def __init__(self, path: Path) -> None:
        self.generation = 0
        """How often the file was read again from its beginning. A resumed run cuts its files and continues them."""
        self._path = path
        self._offset = 0
        self._mark = b""
        """The bytes before `_offset`."""

    def poll(self) -> Iterator[bytes]:
        """Yield the added lines, in a new `generation` those of the complete file. A missing file is an empty one."""
        try:
            file: BinaryIO = self._path.open("rb")
        except FileNotFoundError:
            file = io.BytesIO()
        with file:
            file.seek(self._offset - len(self._mark))
            if file.read(len(self._mark)) != self._mark:
                self.generation += 1
                self._offset, self._mark = 0, b""
                file.seek(0)
            while (line := file.readline()).endswith(b"\n"):
                self._offset += len(line)
                self._mark = line[-_MARK_BYTES:]
                yield line


class JsonLinesReader(Generic[RecordT]):
    """Reads the records of a growing file."""

    def __init__(self, path: Path, record: type[RecordT]) -> None:
        self.records: list[RecordT] = []
        self._record = record
        self._file = GrowingFile(path)

    def poll(self) -> list[RecordT]:
        """Read and return the added records: all of them if the file was written again."""
        generation = self._file.generation
        added = [record for line in self._file.poll() for record in self._read(line)]
        if self._file.generation != generation:
            self.records = []
        self.records += added
        return added

    def _read(self, line: bytes) -> Iterator[RecordT]:
        """Yield the record of a line. A line that is not JSON is left out: a killed process has not completed it."""
        try:
            yield self._record.model_validate_json(line)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise
