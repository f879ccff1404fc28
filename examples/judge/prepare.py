"""Makes what this project starts from: a tiny Llama that invents names of any letters, and prompts.

The warm start shows it random letters, eight a name on average. What a good name is, is left to the judge.
"""

import json
import random
from itertools import product
from pathlib import Path
from string import ascii_lowercase

SEED = 0
MODEL = Path("model")
STEPS, BATCH_SIZE = 100, 64


def main() -> None:
    rng = random.Random(SEED)
    beginnings = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    rng.shuffle(beginnings)
    for name, rows in (("held_out.jsonl", beginnings[:128]), ("prompts.jsonl", beginnings[128:])):
        Path(name).write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    if not (MODEL / "model.safetensors").exists():
        warm_start(rng)


def warm_start(rng: random.Random) -> None:
    """Make the model (0.4 M parameters) and its tokenizer, show it `STEPS` batches of random names, save both."""
    import torch  # here because it takes seconds that a project which is ready need not wait for
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # threads that wait for each other cost a model this small more than they save
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        names = ["".join(rng.choices(ascii_lowercase, k=rng.randint(7, 9))) for _ in range(BATCH_SIZE)]
        input_ids = tokenizer([f"{name}<eos>" for name in names], return_tensors="pt", padding=True).input_ids
        labels = input_ids.masked_fill(input_ids == tokenizer.pad_token_id, -100)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"warm start: step {step} of {STEPS}, loss {loss.item():.2f}", flush=True)
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)  # last, so that its file says that everything is there


def make_tokenizer():
    """One token a letter."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


if __name__ == "__main__":
    main()
