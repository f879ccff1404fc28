"""Notice completions that repeat the same text again and again, as a policy does that has found a loop."""

from __future__ import annotations

import zlib

SHORTEST = 200
"""In characters. Shorter texts are not looked at: a short answer may repeat a word."""
LONGEST = 4000
"""Only the end of a longer text is looked at: a loop goes on until the text is cut off."""
COMPRESSION = 8.0
"""A text that becomes smaller by this factor repeats itself. Prose becomes smaller by 2 to 3, tables and code by 5."""
_HEADER_BYTES = 8


def is_repetitive(text: str) -> bool:
    """Whether the end of `text` repeats itself."""
    end = text[-LONGEST:].encode(errors="replace")  # a tool may answer with half a surrogate pair
    return len(text) >= SHORTEST and len(end) >= COMPRESSION * (len(zlib.compress(end, 1)) - _HEADER_BYTES)
