"""Reads JSON Lines files while another process writes them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from pydantic import BaseModel, ValidationError

RecordT = TypeVar("RecordT", bound=BaseModel)

LINE_BYTES = 32 << 20
"""A longer line is not read."""
BLOCK_BYTES = 64 << 10
_MARK_BYTES = 512
"""How much of what was read last is compared, to notice that a file has been written again."""


def behind_newline(file: BinaryIO, offset: int, end: int) -> int:
    """Return the offset behind the first newline at or after `offset`; `end` if there is none in front of it."""
    file.seek(offset)
    while offset < end:
        block = file.read(BLOCK_BYTES)
        if not block:
            break
        found = block.find(b"\n")
        if found >= 0:
            return min(offset + found + 1, end)
        offset += len(block)
    return end


class GrowingFile:
    """Reads the lines that another process adds to a file. A line is read once it ends with a newline.

    Lines of more than LINE_BYTES are skipped.
    """

    def __init__(self, path: Path) -> None:
        self.generation = 0
        """How often the file was read again from its beginning. A resumed run cuts its files and continues them."""
        self._path = path
        self._offset = 0
        self._mark = b""
        """The bytes before `_offset`."""
        self._is_too_long = False
        """Whether `_offset` is within a line of more than LINE_BYTES. It is skipped, and not read twice."""

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
                self._offset, self._mark, self._is_too_long = 0, b"", False
                file.seek(0)
            while line := file.readline(LINE_BYTES):
                is_complete = line.endswith(b"\n")
                if not (is_complete or self._is_too_long or len(line) == LINE_BYTES):
                    return  # it is being written
                self._offset += len(line)
                self._mark = line[-_MARK_BYTES:]
                if is_complete and not self._is_too_long:
                    yield line
                self._is_too_long = not is_complete


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
