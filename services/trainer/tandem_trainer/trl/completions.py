"""Translate TRL's sampling options to those of a rollout, and completions to the answers that TRL expects."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pydantic import ValidationError

from tandem_protocol.config import ConfigError
from tandem_protocol.messages import Completion, Sampling
from tandem_protocol.problems import summarize

_TEXT_ONLY = frozenset({"detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind"})
"""Options of vLLM that change only the text of a completion, which nobody reads here."""
_REFUSED = {
    "images": "images",
    "features": "images",
    "structured_outputs_regex": "grammars",
    "guided_decoding_regex": "grammars",
    "structured_outputs": "grammars",
}


def sampling_options(given: Mapping[str, Any]) -> tuple[int | None, Sampling]:
    """Return the seed and the sampling options of a call of TRL.

    Raises:
        ConfigError: Rollouts do not have an option.
    """
    options = {name: value for name, value in given.items() if name != "generation_kwargs"}
    options |= given.get("generation_kwargs") or {}
    for name, what in _REFUSED.items():
        value = options.pop(name, None)
        if any(value) if isinstance(value, list | tuple) else value:
            refuse(what)
    if options.pop("logprobs", None):
        refuse("logprobs of other tokens than the sampled one")
    seed = options.pop("seed", None)
    options = {name: value for name, value in options.items() if name not in _TEXT_ONLY and value is not None}
    options["top_k"] = max(0, options.get("top_k", 0))  # -1 is vLLM's other name for all
    try:
        return seed, Sampling(**options)
    except ValidationError as error:
        raise ConfigError(
            f"got a sampling option that Tandem's rollouts do not have: {summarize(error.errors())}. Expected some of "
            f"{', '.join(Sampling.model_fields)}. Fix: change generation_kwargs."
        ) from error


def refuse(what: str) -> NoReturn:
    """Raise ConfigError for something that rollouts do not have."""
    raise ConfigError(f"got a request for {what}; Tandem's rollouts have none. Fix: leave the option out.")


def shaped(
    returned: inspect.Signature, prompts: list[list[int]], completions: Sequence[Completion], *, has_logprobs: bool
) -> Any:
    """Return completions as this version of TRL expects them.

    Args:
        returned: The signature of `generate` of TRL's client. TRL before 0.23 has no argument `logprobs`, and expects
            only the token ids. TRL 1 expects a list of logprobs for each token.
        prompts: Token ids of the prompts.
        completions: All completions of the first prompt, then those of the second, and so on.
        has_logprobs: Whether TRL asked for logprobs.
    """
    ids = [list(completion.token_ids) for completion in completions]
    if "logprobs" not in returned.parameters:
        return ids
    logprobs = [[[logprob] for logprob in completion.logprobs] for completion in completions]
    return {
        "prompt_ids": prompts,
        "completion_ids": ids,
        "logprobs": logprobs if has_logprobs else None,
        "logprob_token_ids": [[[token] for token in row] for row in ids] if has_logprobs else None,
    }
