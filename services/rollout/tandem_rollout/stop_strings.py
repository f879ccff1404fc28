"""Stop strings: texts that end a completion.

Rollouts have none, because a generator knows only tokens. So a completion is cut here, after the token with which its
text first has a stop string. vLLM ends it there, too. What was sampled after that token is dropped, and did not change
what was sampled before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection

from tandem_protocol.messages import Completion, VersionSpan


def stopped(completion: Completion, stops: Collection[str], text: Callable[[int], str]) -> Completion:
    """Return the completion up to the first token with which its text has a stop string, or all of it.

    Args:
        completion: What was sampled.
        stops: The stop strings.
        text: Returns the text of the completion's first tokens, given their number.
    """

    def has_stop(count: int) -> bool:
        beginning = text(count)
        return any(stop in beginning for stop in stops)

    count = len(completion.token_ids)
    if not stops or not has_stop(count):
        return completion
    return _first(completion, bisect_left(range(count), True, key=has_stop))


def _first(completion: Completion, count: int) -> Completion:
    spans, left = [], count
    for span in completion.versions:
        if tokens := min(span.tokens, left):
            spans.append(VersionSpan(version=span.version, tokens=tokens))
        left -= tokens
    return Completion(
        token_ids=completion.token_ids[:count],
        logprobs=completion.logprobs[:count],
        finish_reason="stop",
        versions=tuple(spans),
    )
