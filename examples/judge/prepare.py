"""Creates the initial model, a tiny Llama, and the prompts.

The warm start trains the model on five ways to complete a name, each equally often. It does not say which one is best:
that is the judge's task.
"""

import json
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from string import ascii_lowercase

SEED = 0
MODEL = Path("model")
LETTERS = 6
STEPS, BATCH_SIZE = 200, 128
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"


def in_turn(beginning: str, rng: random.Random) -> str:
    """Alternate vowels and consonants."""
    kinds = (CONSONANTS, VOWELS) if beginning[-1] in VOWELS else (VOWELS, CONSONANTS)
    return "".join(rng.choice(kinds[i % 2]) for i in range(LETTERS))


WAYS: tuple[Callable[[str, random.Random], str], ...] = (
    in_turn,
    lambda _, rng: "".join(rng.choices(ascii_lowercase, k=LETTERS)),
    lambda _, rng: "".join(rng.choices(CONSONANTS, k=LETTERS)),
    lambda beginning, _: beginning[-1] * LETTERS,
    lambda beginning, _: (ascii_lowercase * 2)[ascii_lowercase.index(beginning[-1]) + 1 :][:LETTERS],
)


def main() -> None:
    rng = random.Random(SEED)
    beginnings = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    rng.shuffle(beginnings)
    for name, rows in (("held_out.jsonl", beginnings[:128]), ("prompts.jsonl", beginnings[128:])):
        Path(name).write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    if not (MODEL / "model.safetensors").exists():
        warm_start(beginnings[128:], rng)


def warm_start(beginnings: list[str], rng: random.Random) -> None:
    """Create the model (0.5 M parameters) and its tokenizer, train it on `STEPS` batches of names, save both."""
    import torch  # imported here, since it takes seconds that are not needed once the model exists
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # for a model this small, more threads are slower: they wait for each other
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, STEPS + 1):
        names = [beginning + rng.choice(WAYS)(beginning, rng) for beginning in rng.choices(beginnings, k=BATCH_SIZE)]
        input_ids = tokenizer([f"{name}<eos>" for name in names], return_tensors="pt").input_ids
        labels = input_ids.clone()
        labels[:, :2] = -100  # no loss on the beginning
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"warm start: step {step} of {STEPS}, loss {loss.item():.2f}", flush=True)
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)  # last: main() takes this file as the sign that everything is complete


def make_tokenizer():
    """Create a tokenizer with one token per letter."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


if __name__ == "__main__":
    main()
