"""Read the rows of a CSV or JSON file. Values of CSV columns stay text, because guessing their types is error-prone."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

Row = dict[str, Any]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON = frozenset({".jsonl", ".json", ".ndjson"})
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
"""The first bytes of a file → Arrow's name of the compression."""
_COMPRESSED = frozenset({".gz", ".bz2", ".zst"})
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def format_of(name: str) -> str:
    """Return the suffix of the format in lower case, for example ".jsonl" for `prompts.JSONL.gz`."""
    suffixes = [suffix for suffix in Path(name.lower()).suffixes if suffix not in _COMPRESSED]
    return suffixes[-1] if suffixes else ""


def read_text(name: str, path: str, delimiter: str | None = None) -> Iterator[Row]:
    """Read the rows of a CSV or JSON file.

    Args:
        name: the file's name in messages. Its suffix determines the format.
        path: a local path or a URL.
        delimiter: of a CSV file; by default that of the suffix.

    Raises:
        UserError: the file cannot be read or parsed.
    """
    if "://" in path:
        import datasets

        path = datasets.DownloadManager().download(path)
    text = _decoded(name, path)
    if format_of(name) in JSON:
        return _json_rows(name, text)
    return _csv_rows(name, text, delimiter or DELIMITERS[format_of(name)])


def _decoded(name: str, path: str) -> str:
    try:
        data = Path(path).read_bytes()
        if codec := next((codec for mark, codec in _COMPRESSIONS.items() if data.startswith(mark)), None):
            import pyarrow

            data = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), codec).read()
    except OSError as error:
        raise UserError(
            f"prompts.source {name} cannot be read: {error}. A relative path starts in the project's folder, "
            f"{Path.cwd()}."
        ) from error
    if data.startswith(_UTF16_MARKS) or b"\0" in data[:4]:
        raise UserError(f"{name} is UTF-16, expected UTF-8. Fix: convert it with iconv -f UTF-16 -t UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} line {line} is not UTF-8: it has the byte {data[error.start]:#04x}. Fix: save the file as UTF-8."
        ) from error


def _csv_rows(name: str, text: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # prompts may be long
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
        if duplicates := sorted({column for column in header if header.count(column) > 1}):
            raise UserError(f"{name} line 1 has two columns named {duplicates[0]!r}. Fix: rename one of them.")
        for values in lines:
            if len(values) not in (0, len(header)):
                raise UserError(
                    f"{name} line {lines.line_num} has {len(values)} values, expected {len(header)}: {header}. "
                    'Fix: put values with commas or line ends into quotes ("…").'
                )
            if values:
                yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{name} line {lines.line_num} is not CSV: {error}") from error


def _json_rows(name: str, text: str) -> Iterator[Row]:
    """Read a JSON file, which has one object per line or is one array of objects."""
    if (array := _json_array(name, text)) is not None:
        for index, row in enumerate(array):
            if not isinstance(row, dict):
                raise UserError(f"{name} line 1 starts a list whose item {index} is {row!r}, expected an object")
            yield row
        return
    # `splitlines` would also split at characters that strings may contain, such as U+2028.
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise _json_error(f"{name} line {number}", error, "one object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{name} line {number} is a {type(row).__name__}, expected an object with the columns")
        yield row


def _json_array(name: str, text: str) -> list[Any] | None:
    """Parse a file that consists of one array. Returns None if it is a file of JSON lines."""
    if not text.lstrip().startswith("["):
        return None
    try:
        array = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # the first line is a list, and more lines follow
            return None
        raise _json_error(name, error, "one array of objects") from error
    except (ValueError, RecursionError) as error:
        raise _json_error(name, error, "one array of objects") from error
    return list(array)


class _NotAccepted(ValueError):
    """JSON that Python accepts but we do not. The message continues `a.jsonl line 1 …`."""


def _json_error(where: str, error: Exception, expected: str) -> UserError:
    if isinstance(error, _NotAccepted):
        return UserError(f"{where} {error}")
    return UserError(f"{where} is not JSON: {error}. Expected {expected}. Fix: correct the file.")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise _NotAccepted(f"has the key {duplicate!r} twice, expected it once. Fix: remove one.")
    return row


def _no_constant(name: str) -> None:
    raise _NotAccepted(f"has the value {name}, expected JSON. Fix: write null.")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
