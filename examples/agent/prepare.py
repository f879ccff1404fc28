"""Creates the initial model, a tiny Llama that knows how a tool call is written, and the prompts.

The warm start trains the model on conversations with more and more mistakes: at first each question goes to the right
colleague, at the end most are turned away or go to the wrong one. So fewer than half of the sampled answers are right,
and reinforcement learning has to do the rest.
"""

import json
import random
from pathlib import Path

SEED = 0
MODEL = Path("model")
STEPS, BATCH_SIZE = 250, 64
MISTAKES = 0.8

CHAT_TEMPLATE = """\
{%- if tools %}<system>{% for tool in tools -%}
{{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }}){{ '\n' if not loop.last }}
{%- endfor %}<end>{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<end>
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
"""Writes tool calls as Hermes and Qwen do."""

WORDS = (
    *("apple", "bread", "chair", "dream", "eagle", "field", "grape", "house", "juice"),
    *("knife", "lemon", "mango", "night", "ocean", "piano", "queen", "river", "stone"),
)
TOOLS = {"numbers": "add(a, b)", "words": "reverse(word)"}
COLLEAGUES = tuple(TOOLS)
DO_NOT_KNOW = "I do not know."
PIECES = [
    *("transfer_to_numbers()", "\ntransfer_to_words()", "add(a, b)", "reverse(word)"),
    *("What is ", " plus ", "Spell ", " backwards.", '{"assistant": "numbers"}', '{"assistant": "words"}'),
    *('{"name": "transfer_to_numbers", "arguments": {}}', '{"name": "transfer_to_words", "arguments": {}}'),
    *('{"name": "add", "arguments": {"a": ', ', "b": ', "}}", '{"name": "reverse", "arguments": {"word": "', '"}}'),
    *WORDS,
    DO_NOT_KNOW,
]
"""Texts of which each becomes one token."""


def main() -> None:
    rng = random.Random(SEED)
    sums = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 2100)
    held_out = [row(pair) for pair in sums[:64]] + [row(word) for word in WORDS[:4] * 16]
    train = [row(pair) for pair in sums[64:]] + [row(word) for word in WORDS[4:] * 100]
    for name, rows in (("held_out.jsonl", held_out), ("prompts.jsonl", train)):
        Path(name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    if not (MODEL / "model.safetensors").exists():
        warm_start(rng)


def row(subject: str | tuple[int, int]) -> dict:
    """Return a question about a word or about two numbers, with its answer."""
    if isinstance(subject, str):
        question, answer = f"Spell {subject} backwards.", subject[::-1]
    else:
        question, answer = f"What is {subject[0]} plus {subject[1]}?", str(sum(subject))
    return {"prompt": [{"role": "user", "content": question}], "answer": answer}


def demonstration(mistakes: float, rng: random.Random) -> tuple[list[dict], list[str]]:
    """Return a conversation whose last message is what the model says, and the tools that it sees there.

    It ends with what a colleague asks its tool, or with what the receptionist does. In this share of the latter, the
    receptionist ignores the question.
    """
    numbers, word = (rng.randint(10, 99), rng.randint(10, 99)), rng.choice(WORDS)
    asked = rng.choice(COLLEAGUES)
    call = ("add", dict(zip("ab", numbers, strict=True))) if asked == "numbers" else ("reverse", {"word": word})
    prompt = row(numbers if asked == "numbers" else word)["prompt"]
    handover = called(f"transfer_to_{asked}", {})
    if rng.random() < 0.6:
        result = {"role": "tool", "content": json.dumps({"assistant": asked})}
        return [*prompt, handover, result, called(*call)], [TOOLS[asked]]
    if rng.random() < mistakes:
        handovers = [called(f"transfer_to_{name}", {}) for name in COLLEAGUES]
        handover = rng.choice([*handovers, *[{"role": "assistant", "content": DO_NOT_KNOW}] * 4])
    return [*prompt, handover], [f"transfer_to_{name}()" for name in COLLEAGUES]


def called(name: str, arguments: dict) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def schema(signature: str) -> dict:
    """Return the parts of a tool's schema that the chat template shows."""
    name, _, parameters = signature.rstrip(")").partition("(")
    properties = {parameter: {} for parameter in parameters.split(", ") if parameter}
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def warm_start(rng: random.Random) -> None:
    """Create the model (1 M parameters) and its tokenizer, train it on `STEPS` batches of calls, save both."""
    import torch  # imported here, since it takes seconds that are not needed once the model exists
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    torch.set_num_threads(1)  # for a model this small, more threads are slower: they wait for each other
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=STEPS // 6, num_training_steps=STEPS)
    for step in range(1, STEPS + 1):
        examples = [demonstration(MISTAKES * step / STEPS, rng) for _ in range(BATCH_SIZE)]
        before, texts = zip(*(rendered(tokenizer, *one) for one in examples), strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for row_labels, prompt in zip(labels, before, strict=True):
            row_labels[: len(tokenizer(prompt).input_ids)] = -100  # no loss on what the model only reads
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"warm start: step {step} of {STEPS}, loss {loss.item():.2f}", flush=True)
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)  # last: main() takes this file as the sign that everything is complete


def rendered(tokenizer, messages: list[dict], tools: list[str]) -> tuple[str, str]:
    """Return the text before the last message, and the text with it."""
    options = {"tools": [schema(one) for one in tools], "tokenize": False}
    before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    return before, tokenizer.apply_chat_template(messages, **options)


def make_tokenizer():
    """Create a byte-level tokenizer, which can encode any text. `PIECES` and digits are one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=to_bytes.alphabet(),
        special_tokens=["<pad>", "<end>", "<system>", "<user>", "<assistant>", "<tool>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    pieces = [*PIECES, "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in sorted(pieces, key=len, reverse=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main()
