"""Translate TRL's sampling options to those of a rollout, and completions to the answers that TRL expects."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pydantic import ValidationError

from tandem_protocol.config import ConfigError
from tandem_protocol.messages import Completion, Sampling
from tandem_protocol.problems import summarize

_TEXT_ONLY = frozenset({
    *("detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    *("include_stop_str_in_output", "output_kind"),
})  # fmt: skip
"""Options of vLLM that change only the text of a completion. TRL reads its tokens."""
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
    options = all_options(given)
    options.pop("stop", None)  # `stop_strings` reads it
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


def all_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call of TRL. Those in `generation_kwargs` win."""
    options = {name: value for name, value in given.items() if name != "generation_kwargs"}
    return options | (given.get("generation_kwargs") or {})


def refuse(what: str) -> NoReturn:
    """Raise ConfigError for something that rollouts do not have."""
    raise ConfigError(f"got a request for {what}; Tandem's rollouts have none. Fix: leave the option out.")


def check_token_ids(completions: Sequence[Completion], trainer: Any, served: str) -> None:
    """Check that the model that is trained has the tokens of the completions. Torch would end with an index error.

    Args:
        completions: Sampled completions.
        trainer: TRL's trainer, which has the model. None if it is not known.
        served: Name of the generator's model.

    Raises:
        ConfigError: The generator serves a model with a larger vocabulary.
    """
    model = getattr(trainer, "model", None)
    vocab_size = getattr(model and model.get_input_embeddings(), "num_embeddings", None)
    largest = max((max(completion.token_ids, default=0) for completion in completions), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise ConfigError(
            f"got the token id {largest} from a generator with the model {served!r}, expected ids below {vocab_size}, "
            "the size of the vocabulary of the script's model. Fix: start the generator with the script's model; in a "
            "test, GeneratorContainer(model=FOLDER)."
        )


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
