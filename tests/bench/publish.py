"""Measure how long a weight version takes to publish and load, relative to writing and reading the same bytes.

    python tests/bench/publish.py [--rounds 5] [--hidden 768] [--folder /dev/shm] [--delta 0.01]

A real vLLM on the CPU loads the version, and the trainer's own code writes it. The baseline writes the same bytes to
one file with `write` and `fsync`, and reads them with `readinto` into memory that is already allocated. Both alternate
in the same folder. The result is the median of the rounds' ratios.

With --delta FRACTION no engine is started. That fraction of a bfloat16 model's words changes, and the result is what a
delta version takes: bytes, seconds to write it, and seconds to make and verify the complete files out of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.generators import Generator, running
from support.models import make_tokenizer
from tandem_generator.materializer import Materializer
from tandem_protocol.fingerprint import fingerprint
from tandem_protocol.manifest import Manifest
from tandem_protocol.messages import ServedWeights, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.learner.shards import MAX_FILES, model_table, model_tensors, part_files, write_part
from tandem_trainer.published_copy import Plan, PublishedCopy


def make_model(folder: Path, hidden: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=8,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def publish_and_switch(
    model: LlamaForCausalLM, store: WeightStore, step: int, generator: Generator
) -> dict[str, float]:
    version = Version(step, 1)
    began = time.perf_counter()
    table = model_table(model, torch.float32)
    with store.staging(version, needs_bytes=sum(t.nbytes for t in table.values())) as staged:
        tensors = model_tensors(model, torch.float32)
        digests = write_part(staged, table, tensors, rank=0, ranks=1, max_files=MAX_FILES)
        written = time.perf_counter()
        ours = fingerprint(Path(model.name_or_path))
        _, digest = store.commit(staged, version, run="bench", fingerprint=ours, digests=digests)
    committed = time.perf_counter()
    response = generator.put(version, digest, SwitchMode.IN_FLIGHT)
    assert response.status_code == 200, response.text
    timings = ServedWeights.model_validate(response.json()).timings
    assert timings is not None
    store.retain(1)
    return {
        "write": written - began,
        "commit": committed - written,
        "verify": timings.verify_s,
        "pause": timings.pause_s,
        "load": timings.load_s,
        "all": time.perf_counter() - began,
    }


def write_and_read(data: list[memoryview], path: Path, target: bytearray) -> float:
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for piece in data:
            file.write(piece)
        os.fsync(file.fileno())
    with path.open("rb", buffering=0) as file:
        assert file.readinto(target) == len(target)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def median(take: Callable[[int], float], rounds: int) -> float:
    return statistics.median(take(i) for i in range(rounds))


@torch.no_grad()
def change(model: LlamaForCausalLM, fraction: float) -> None:
    """Change a bit of some words, as an optimizer step does."""
    for parameter in model.parameters():
        words = parameter.view(torch.int16)
        words ^= (torch.rand(words.shape) < fraction).to(torch.int16)


def deltas(rounds: int, hidden: int, folder: str, fraction: float) -> None:
    """Compare deltas with complete versions, in turns. Half of the versions have no parent."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        model = make_model(root / "model", hidden).to(torch.bfloat16)
        ours, store = fingerprint(root / "model"), WeightStore(root / "weights")
        (store.root / "versions").mkdir(parents=True)
        files = part_files(model_table(model, torch.bfloat16), rank=0, ranks=1)
        copy, materializer = PublishedCopy(files), Materializer(store, root / "made", "bench")
        last: tuple[Manifest, str] | None = None
        used: tuple[Path, ...] = ()
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for step in range(2 * rounds + 4):
            version, parent = Version(step, 1), last if step % 2 else None
            change(model, fraction)
            began = time.perf_counter()
            with store.staging(version, needs_bytes=0) as staged:
                plan = Plan(version, parent[0].version if parent else None)
                digests = copy.write(staged, files, model_tensors(model, torch.bfloat16), plan=plan)
                last = store.commit(staged, version, run="bench", fingerprint=ours, digests=digests, parent=parent)
            written = time.perf_counter()
            used = materializer.make(*last, used)
            done = time.perf_counter()
            size = sum(path.stat().st_size for path in store.directory(version).glob("*.safetensors*"))
            found[parent is not None].append({"MB": size / 1e6, "write": written - began, "read": done - written})
            store.retain(1)
        materializer.close()
    for is_delta, rows in found.items():
        parts = ", ".join(f"{part} {statistics.median(row[part] for row in rows[2:]):.3f}" for part in rows[0])
        print(f"{'delta' if is_delta else 'complete'}: {parts} (seconds; read: make the files if needed, and verify)")


def main(rounds: int, hidden: int, folder: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        model = make_model(root / "model", hidden)
        store = WeightStore(root / "weights")
        (store.root / "versions").mkdir(parents=True)
        data = [memoryview(t.numpy()).cast("B") for _, t in model_tensors(model, torch.float32)]
        target = bytearray(sum(piece.nbytes for piece in data))
        with running("vllm", root / "model", store.root, "--max-model-len", "512", log=root / "log") as generator:
            ours, plain = [], []
            for step in range(rounds + 1):
                plain.append(write_and_read(data, root / "plain", target))
                ours.append(publish_and_switch(model, store, step, generator))
    ours, plain = ours[1:], plain[1:]  # the first round warms up
    ratio = statistics.median(o["all"] / p for o, p in zip(ours, plain, strict=True))
    parts = ", ".join(f"{part} {median(lambda i, part=part: ours[i][part], rounds):.3f}" for part in ours[0])
    print(f"{len(target) / 1e6:.0f} MB in {folder}: (publish + switch) ÷ (plain write + read) = {ratio:.2f}")
    print(f"  seconds: {parts}; plain {statistics.median(plain):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
    parser.add_argument("--delta", type=float, metavar="FRACTION")
    arguments = parser.parse_args()
    if arguments.delta:
        deltas(arguments.rounds, arguments.hidden, arguments.folder, arguments.delta)
    else:
        main(arguments.rounds, arguments.hidden, arguments.folder)
