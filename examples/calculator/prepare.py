"""Creates the initial model, a tiny Llama that knows how a tool call is written, and the prompts.

The warm start trains the model on conversations with random mistakes: some have no tool call, some calls have the wrong
operator, and most answers have a zero too many. So about one sampled answer in five is right, and reinforcement
learning has to do the rest.
"""

import json
import random
from pathlib import Path

from tools import OPERATORS, calculate

SEED = 0
MODEL = Path("model")
STEPS, BATCH_SIZE = 300, 64

CHAT_TEMPLATE = """\
{%- if tools %}<system>{% for tool in tools -%}
{{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }})
{%- endfor %}<end>{% endif %}
{%- for message in messages %}<{{ message.role }}>
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<end>{% endgeneration %}{% else %}{{ message.content }}<end>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
"""Writes tool calls as Hermes and Qwen do. `generation` marks what the warm start trains on."""

CALL = '{"name": "calculate", "arguments": {"expression": "'
PIECES = ["calculate(expression)", "What is ", " + ", " - ", " * ", CALL, '"}}']
"""Texts of which each becomes one token."""

Conversation = list[dict]


def main() -> None:
    rng = random.Random(SEED)
    expressions = [f"{a} {operator} {b}" for a in range(10, 100) for operator in OPERATORS for b in range(10, 100)]
    rng.shuffle(expressions)
    held_out, train = expressions[:256], expressions[256:8256]
    write_prompts(Path("held_out.jsonl"), held_out)
    write_prompts(Path("prompts.jsonl"), train)
    if not (MODEL / "model.safetensors").exists():
        warm_start(train, rng)


def write_prompts(path: Path, expressions: list[str]) -> None:
    rows = ({"prompt": question(one), "answer": str(calculate(one))} for one in expressions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def question(expression: str) -> Conversation:
    return [{"role": "user", "content": f"What is {expression}?"}]


def demonstration(expression: str, rng: random.Random) -> Conversation:
    """Return a conversation with random mistakes."""
    if rng.random() < 0.2:  # no call
        return [*question(expression), {"role": "assistant", "content": str(rng.randint(-89, 9801))}]
    first, operator, second = expression.split()
    if rng.random() < 0.3:
        operator = rng.choice(list(OPERATORS))
    asked = f"{first} {operator} {second}"
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": asked}}}
    result = str(calculate(asked))
    answer = result if rng.random() < 0.3 else f"{result}0"
    return [
        *question(expression),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculate", "content": result},
        {"role": "assistant", "content": answer},
    ]


def warm_start(expressions: list[str], rng: random.Random) -> None:
    """Create the model (0.98 M parameters) and its tokenizer, train it on `STEPS` batches of examples, save both."""
    import torch  # imported here, since it takes seconds that are not needed once the model exists
    from transformers import get_cosine_schedule_with_warmup
    from transformers.utils import get_json_schema

    torch.set_num_threads(1)  # for a model this small, more threads are slower: they wait for each other
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=STEPS // 6, num_training_steps=STEPS)
    for step in range(1, STEPS + 1):
        batch = tokenizer.apply_chat_template(
            [demonstration(one, rng) for one in rng.choices(expressions, k=BATCH_SIZE)],
            tools=[get_json_schema(calculate)],
            return_assistant_tokens_mask=True,
            return_dict=True,
            padding=True,
            return_tensors="pt",
        )
        labels = batch.input_ids.masked_fill(batch.assistant_masks == 0, -100)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"warm start: step {step} of {STEPS}, loss {loss.item():.2f}", flush=True)
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)  # last: main() takes this file as the sign that everything is complete


def make_tokenizer():
    """Create a byte-level tokenizer, which can encode any text. `PIECES` and digits are one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=to_bytes.alphabet(),
        special_tokens=["<pad>", "<end>", "<system>", "<user>", "<assistant>", "<tool>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(PIECES, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer):
    """Create a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
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


if __name__ == "__main__":
    main()
