"""Completions of single prompts as trajectories of one turn."""

from __future__ import annotations

from pydantic_core import to_jsonable_python
from transformers import PreTrainedTokenizerBase

from tandem_protocol.messages import Completion, Group

from .environments.base import opening
from .prompts import PromptRow
from .text import without_surrogates
from .trajectory import ChatMessage, Sequence, Trajectory


class CompletionReader:
    """Turns the answer to a prompt into trajectories without rewards, one for each completion."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, row: PromptRow, group: Group) -> tuple[Trajectory, ...]:
        """Return the trajectories of `row` in the order of the completions. Text has no special tokens."""
        ids = [completion.token_ids for completion in group.completions]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        # A conversation of the data set may have keys with values that JSON cannot express, such as a date.
        prompt = tuple(to_jsonable_python(without_surrogates(opening(row)), fallback=str))
        pairs = zip(group.completions, texts, strict=True)
        return tuple(_trajectory(row, prompt, completion, text) for completion, text in pairs)


def _trajectory(row: PromptRow, prompt: tuple[ChatMessage, ...], completion: Completion, text: str) -> Trajectory:
    return Trajectory(
        sequences=(Sequence.of_completion(row.token_ids, completion),),
        messages=(*prompt, {"role": "assistant", "content": text}),
        num_prompt_messages=len(prompt),
        status="finished" if completion.finish_reason == "stop" else "max_tokens",
        turns=1,
    )
