"""Creates the initial model, a tiny Llama, and the prompts.

The warm start trains the model on games with more and more mistakes: at first all moves follow the hints, at the end
most are wasted. So the model can tell the hints apart, but it mostly waits. Reinforcement learning has to do the rest.
"""

import json
import random
from itertools import product
from pathlib import Path

from game import MOVES, Treasure

SEED = 0
MODEL = Path("model")
SIZE = 4
STEPS, BATCH_SIZE = 150, 64
MISTAKES = 0.8

CHAT_TEMPLATE = """\
{%- for message in messages %}<{{ message.role }}>
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}<end>{% endgeneration %}
{%- else %}{{ message.content }}<end>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
"""`generation` marks what the warm start trains on."""

WAIT = "wait"
PROMPT = [{"role": "user", "content": "Find the treasure."}]


def main() -> None:
    rng = random.Random(SEED)
    places = list(product(range(SIZE), repeat=2))
    games = [(start, treasure) for start in places for treasure in places if start != treasure]
    rng.shuffle(games)
    held_out, train = games[:60], games[60:]
    write_prompts(Path("held_out.jsonl"), held_out)
    write_prompts(Path("prompts.jsonl"), train)
    if not (MODEL / "model.safetensors").exists():
        warm_start(train, rng)


def write_prompts(path: Path, games: list) -> None:
    rows = ({"prompt": PROMPT, "start": start, "treasure": treasure} for start, treasure in games)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def demonstration(games: list, mistakes: float, rng: random.Random) -> list[dict]:
    """Return a conversation in which this share of the moves ignores the hint."""
    game = Treasure()
    messages: list[dict] = []
    for _ in range(rng.randint(1, 5)):
        hint = game.reset(*rng.choice(games))
        (towards,) = [name for name in MOVES if name in hint]
        move = rng.choice([*MOVES, *[WAIT] * 8]) if rng.random() < mistakes else towards
        messages.append({"role": "user", "content": hint if messages else PROMPT[0]["content"] + hint})
        messages.append({"role": "assistant", "content": move})
    return messages


def warm_start(games: list, rng: random.Random) -> None:
    """Create the model (0.6 M parameters) and its tokenizer, train it on `STEPS` batches of games, save both."""
    import torch  # imported here, since it takes seconds that are not needed once the model exists
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # for a model this small, more threads are slower: they wait for each other
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, STEPS + 1):
        batch = tokenizer.apply_chat_template(
            [demonstration(games, MISTAKES * step / STEPS, rng) for _ in range(BATCH_SIZE)],
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
        if step % 10 == 0:
            print(f"warm start: step {step} of {STEPS}, loss {loss.item():.2f}", flush=True)
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)  # last: main() takes this file as the sign that everything is complete


def make_tokenizer():
    """Create a byte-level tokenizer, which can encode any text. What is said in a game are tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<end>", "<user>", "<assistant>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    said = [PROMPT[0]["content"], " It is ", *MOVES, WAIT]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in said])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main()
