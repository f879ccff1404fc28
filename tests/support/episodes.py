"""Tokenizers, renderers and a scripted policy for tests of multi-turn episodes."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support.chat_templates import TEMPLATES
from tandem_protocol.messages import Completion, VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.chat_template import render
from tandem_rollout.rendering import Conversation, Renderer, Schema

ALSO_ENDS = {"Gemma 4": "<|tool_response>"}
"""A second token that ends turns."""
QWEN_3_THINKING = (
    "{% set last = namespace(question=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > last.question and (thought or loop.last) %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Shows the thinking behind the last question, and drops that of earlier turns, as Qwen 3's own template does."""

GEMMA_4 = (
    "{{ bos_token }}{% set open = namespace(turn=false) %}{% for m in messages if m.role != 'tool' %}"
    "{% set at = messages.index(m) %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ '<|tool_call>' + c.function.name }}{{ c.function.arguments | tojson }}{{ '<tool_call|>' }}{% endfor %}"
    "{% set results = namespace(go=true) %}{% for r in messages[at + 1:] if m.tool_calls %}"
    "{% if r.role != 'tool' %}{% set results.go = false %}{% endif %}"
    "{% if results.go %}{{ '<|tool_response>' + r.content + '<tool_response|>' }}{% endif %}{% endfor %}"
    "{{ m.content }}{% set open.turn = m.tool_calls and not m.content %}"
    "{% if not (open.turn and loop.last) %}{{ '<turn|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not open.turn %}{{ '<|turn>model\\n' }}{% endif %}"
)
"""Writes the results of tools into the turn that called them, before the text of that turn, as Gemma 4's template."""

ALL_TEMPLATES = {name: template for name, (template, _) in TEMPLATES.items()} | {
    "Qwen 3, thinking": QWEN_3_THINKING,
    "Gemma 4": GEMMA_4,
}
WITH_TOOLS = ("Llama 3", "Mistral", "Qwen 2.5", "Qwen 3", "Qwen 3, thinking", "DeepSeek R1", "InternLM", "Gemma 4")
"""Templates that show tool calls and their results."""
END_OF_TURN = {
    "Llama 3": "<|eot_id|>",
    "Gemma": "<end_of_turn>",
    "Gemma 4": "<turn|>",
    "Phi 3": "<|end|>",
    "a vision model's": "<end>",
} | dict.fromkeys(
    ("ChatML", "Qwen 2.5", "Qwen 3", "Qwen 3, thinking", "InternLM", "one that takes strings and parts"), "<|im_end|>"
)
"""The token that ends a turn. For the other templates it is the tokenizer's `</s>`."""

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
    },
}
"""A response template in the style of Qwen 3's."""

_SPECIAL = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|end|>", "<end>", "<|eom_id|>", "<|User|>", "<|Assistant|>"),
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|action|>", "<|calls|>", "<|call|>"),
    *("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
]
_ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_CORPUS = [
    "What is the answer? Let me see, I think it is forty two. The tool says yes and no, hello, user and assistant.",
    '{"name": "add", "arguments": {"a": 1, "b": 2}} {"name": "search", "parameters": {"query": "weather in Paris"}}',
    "  \n\n  system  \n user \t tool  \n\n\nanswer  ",
] * 3


@functools.cache
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens of all templates. It can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=_SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def renderer(
    name: str,
    *,
    chat_template: str | None = None,
    end_of_turn: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Renderer:
    """The renderer for one of `ALL_TEMPLATES`, or for another chat template."""
    tokenizer = tokenizer or bpe_tokenizer()
    options = {"chat_template": chat_template or ALL_TEMPLATES[name]}

    def text(messages: Conversation, tools: Sequence[Schema]) -> str:
        return render("the test", messages, tools, tokenizer, options).text

    ends = end_of_turn or END_OF_TURN.get(name)
    end_ids = [tokenizer.convert_tokens_to_ids(token) for token in (ends, ALSO_ENDS.get(name)) if token]
    return Renderer(tokenizer, text, end_ids)


def odd_ids(text: str, chance: random.Random) -> tuple[int, ...]:
    """Encode text as a policy may sample it: cut at random places. The tokenizer would often cut it differently."""
    cuts = sorted(chance.sample(range(len(text) + 1), k=min(len(text) + 1, chance.randint(0, 6))))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return tuple(token for part in parts for token in bpe_tokenizer()(part, add_special_tokens=False).input_ids)


def completion(
    token_ids: Sequence[int], chance: random.Random | None = None, *, finish_reason: Any = "stop", step: int = 1
) -> Completion:
    """A completion of these tokens. The weights are switched within it if `chance` says so."""
    size = len(token_ids)
    first = chance.randint(0, size) if chance else size
    spans = [VersionSpan(version=Version(step, 1), tokens=first)]
    if first < size:
        spans.append(VersionSpan(version=Version(step + 1, 1), tokens=size - first))
    return Completion(
        token_ids=tuple(token_ids),
        logprobs=tuple(-(chance.random() + 0.01) if chance else -0.5 for _ in token_ids),
        finish_reason=finish_reason,
        versions=tuple(spans),
    )


class Policy:
    """A policy that says given texts, and keeps every prompt that it gets.

    Args:
        texts: what it says, turn by turn. The last text is said again and again.
        ended: whether it ends its turns itself.
    """

    def __init__(self, *texts: str, name: str = "Qwen 3", ended: bool = True, seed: int = 0) -> None:
        self.calls: list[tuple[tuple[int, ...], Completion]] = []
        self._texts = texts
        end = bpe_tokenizer().convert_tokens_to_ids(END_OF_TURN.get(name, "</s>"))
        self._end = (end,) if ended else ()
        self._chance = random.Random(seed)

    async def __call__(self, prompt_ids: tuple[int, ...], *, max_tokens: int, turn: int) -> Completion:
        text = self._texts[min(turn, len(self._texts) - 1)]
        ids = odd_ids(text, self._chance) + self._end
        reason = "stop" if len(ids) <= max_tokens else "length"
        answer = completion(ids[:max_tokens], self._chance, finish_reason=reason, step=1 + turn)
        self.calls.append((prompt_ids, answer))
        return answer


class Row(NamedTuple):
    """A row of a data set."""

    prompt: Any = "Hi."
    token_ids: Sequence[int] = ()
    columns: Mapping[str, Any] = {}


def called(tool: str, **arguments: Any) -> str:
    """A tool call as Hermes and Qwen write it."""
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


@functools.cache
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the style of Llama 2 and Gemma: spaces are letters, and a text begins with one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = sorted({letter for text in _CORPUS for letter in text} | set("▁[]_/<>\n"))
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=letters, special_tokens=_SPECIAL + bytes_, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
