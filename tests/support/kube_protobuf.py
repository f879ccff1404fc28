"""Decode the part of Kubernetes' protobuf encoding that helm uses: the Secrets in which it stores its releases."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterator

from support.helm import Object

MAGIC = b"k8s\x00"
# Field numbers
RAW = 2  # of runtime.Unknown
METADATA, DATA, TYPE = 1, 2, 3  # of Secret
NAME, LABELS = 1, 11  # of ObjectMeta
KEY, VALUE = 1, 2  # of a map entry


def secret(body: bytes) -> Object:
    """Return the Secret in the body of a request."""
    message = _fields(_fields(body.removeprefix(MAGIC))[RAW][0])
    metadata = _fields(message[METADATA][0])
    labels = (_fields(entry) for entry in metadata[LABELS])
    data = (_fields(entry) for entry in message[DATA])
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": metadata[NAME][0].decode(),
            "labels": {entry[KEY][0].decode(): entry[VALUE][0].decode() for entry in labels},
        },
        "type": message[TYPE][0].decode(),
        "data": {entry[KEY][0].decode(): base64.b64encode(entry[VALUE][0]).decode() for entry in data},
    }


def _fields(message: bytes) -> dict[int, list[bytes]]:
    """Return the length-delimited values by field number. Numeric fields are left out."""
    found: defaultdict[int, list[bytes]] = defaultdict(list)
    rest = iter(message)
    for key in _varints(rest):
        length = next(_varints(rest))
        if key & 7 == 2:
            found[key >> 3].append(bytes(next(rest) for _ in range(length)))
    return found


def _varints(rest: Iterator[int]) -> Iterator[int]:
    value = shift = 0
    for byte in rest:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield value
            value = shift = 0
