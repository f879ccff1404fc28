"""Creates the initial model, a tiny Llama, and the prompts.

The warm start trains the model on five operations on digits, each equally often. It does not say which one is right. So
about one sampled answer in ten is right, and reinforcement learning has to do the rest. It is the
model of `examples/digits`.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

SEED = 0
HERE = Path(__file__).parent
MODEL = HERE / "model"
DIGITS = 6
STEPS, BATCH_SIZE = 200, 128

DEMONSTRATIONS: tuple[Callable[[str], str], ...] = (
    lambda digits: "".join(sorted(digits)),
    lambda digits: "".join(sorted(digits, reverse=True)),
    lambda digits: digits[::-1],
    lambda digits: digits[1:] + digits[0],
    lambda digits: digits,
)


def main() -> None:
    rng = random.Random(SEED)
    rows = sorted({"".join(rng.choices("0123456789", k=DIGITS)) for _ in range(10_000)})
    rng.shuffle(rows)
    lines = [json.dumps({"prompt": f"{row}>", "answer": "".join(sorted(row))}) + "\n" for row in rows]
    (HERE / "prompts.jsonl").write_text("".join(lines))
    if not (MODEL / "model.safetensors").exists():
        warm_start(rows, rng)


def warm_start(rows: list[str], rng: random.Random) -> None:
    """Create the model (0.86 M parameters) and its tokenizer, train it on `STEPS` batches of examples, save both."""
    import torch  # imported here, since it takes seconds that are not needed once the model exists
    from transformers import get_cosine_schedule_with_warmup

    torch.set_num_threads(1)  # for a model this small, more threads are slower: they wait for each other
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=STEPS // 6, num_training_steps=STEPS)
    for step in range(1, STEPS + 1):
        texts = [f"{row}>{rng.choice(DEMONSTRATIONS)(row)}<eos>" for row in rng.choices(rows, k=BATCH_SIZE)]
        input_ids = tokenizer(texts, return_tensors="pt").input_ids
        labels = input_ids.clone()
        labels[:, : DIGITS + 1] = -100  # no loss on the prompt
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"warm start: step {step} of {STEPS}, loss {loss.item():.2f}", flush=True)
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)  # last: main() takes this file as the sign that everything is complete


def make_tokenizer():
    """Create a tokenizer with one token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", ">", *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer):
    """Create a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


if __name__ == "__main__":
    main()
