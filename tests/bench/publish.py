"""Measure how long a weight version takes to publish and load, relative to plain files and to vLLM's own reload.

    python tests/bench/publish.py [--shapes 1M 135M 0.5B] [--rounds 5] [--folder /dev/shm]

A real vLLM on the CPU loads the version, and the trainer's own code writes it. One baseline writes the same bytes to a
file with `write` and `fsync`, and reads them with `readinto` into memory that is already allocated. The other one does
without Tandem: `save_pretrained`, then `reload_weights` of a `vllm serve`, which checks nothing. All take turns.

A second table compares versions of a bfloat16 model that are deltas with complete ones. It needs no engine.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, alternate, options, ratio, write
from support.generators import Generator, running
from support.models import make_tokenizer
from support.vllm_serve import vllm_serve
from tandem_generator.materializer import Materializer
from tandem_protocol.fingerprint import fingerprint
from tandem_protocol.manifest import Manifest
from tandem_protocol.messages import ModelFingerprint, ServedWeights, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.learner.shards import MAX_FILES, model_table, model_tensors, part_files, write_part
from tandem_trainer.published_copy import Plan, PublishedCopy


class Shape(NamedTuple):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    dtype: torch.dtype = torch.float32


SHAPES = {
    "1M": Shape(2048, 128, 512, 4, 2, 1),
    "135M": Shape(49152, 576, 1536, 30, 9, 3),  # SmolLM2-135M
    "0.5B": Shape(151936, 896, 4864, 24, 14, 2, torch.bfloat16),  # Qwen2.5-0.5B
}


def make_model(shape: Shape, *folders: Path) -> LlamaForCausalLM:
    """Write a model with random weights into the folders."""
    sizes: dict[str, Any] = {name: size for name, size in shape._asdict().items() if name != "dtype"}
    config = LlamaConfig(**sizes, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config).to(shape.dtype)
    for folder in folders:
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return model


def publish_and_switch(
    model: LlamaForCausalLM,
    dtype: torch.dtype,
    ours: ModelFingerprint,
    store: WeightStore,
    step: int,
    generator: Generator,
) -> dict[str, float]:
    version = Version(step, 1)
    table = model_table(model, dtype)  # the trainer makes it once
    began = time.perf_counter()
    with store.staging(version, needs_bytes=sum(t.nbytes for t in table.values())) as staged:
        tensors = model_tensors(model, dtype)
        digests = write_part(staged, table, tensors, rank=0, ranks=1, max_files=MAX_FILES)
        written = time.perf_counter()
        _, digest = store.commit(staged, version, run="bench", fingerprint=ours, digests=digests)
    committed = time.perf_counter()
    response = generator.put(version, digest, SwitchMode.IN_FLIGHT)
    assert response.status_code == 200, response.text
    timings = ServedWeights.model_validate(response.json()).timings
    assert timings is not None
    served = time.perf_counter()
    store.retain(1)  # the trainer does it behind that, too
    return {
        "write": written - began,
        "commit": committed - written,
        "verify": timings.verify_s,
        "pause": timings.pause_s,
        "load": timings.load_s,
        "all": served - began,
        "retain": time.perf_counter() - served,
    }


def save_and_reload(model: LlamaForCausalLM, folder: Path, server: httpx.Client) -> float:
    began = time.perf_counter()
    model.save_pretrained(folder)
    response = server.post("/collective_rpc", json={"method": "reload_weights"})
    assert response.status_code == 200, response.text
    return time.perf_counter() - began


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


def measure(name: str, rounds: int, root: Path) -> list[str]:
    """Measure one shape, and return its row."""
    shape = SHAPES[name]
    model = make_model(shape, root / "model", root / "served")
    store = WeightStore(root / "weights")
    (store.root / "versions").mkdir(parents=True)
    data = [memoryview(t.view(torch.uint8).numpy().data).cast("B") for _, t in model_tensors(model, shape.dtype)]
    target = bytearray(sum(piece.nbytes for piece in data))
    of_model = fingerprint(root / "model")
    words = ("--max-model-len", "512", "--dtype", str(shape.dtype).removeprefix("torch."))
    with (
        running("vllm", root / "model", store.root, *words, log=root / "log") as generator,
        vllm_serve(root / "served", *words, log=root / "serve.log") as server,
    ):
        steps = iter(range(1000))
        ours: list[dict[str, float]] = []

        def publish() -> float:
            ours.append(publish_and_switch(model, shape.dtype, of_model, store, next(steps), generator))
            return ours[-1]["all"]

        sides: dict[str, Callable[[], float]] = {
            "plain": partial(write_and_read, data, root / "plain", target),
            "publish": publish,
            "reload": partial(save_and_reload, model, root / "served", server),
        }
        seconds = alternate(sides, rounds)
    parts = [f"{statistics.median(one[part] for one in ours[-rounds:]):.3f}" for part in PARTS]
    ratios = (ratio(seconds["publish"], seconds[other]) for other in ("plain", "reload"))
    return [name, f"{len(target) / 1e6:,.0f}", *ratios, *parts]


CHANGED = 0.01
"""Fraction of the words that change, as usual learning rates change per step."""


@torch.no_grad()
def change(model: LlamaForCausalLM, share: float = CHANGED) -> None:
    """Change a bit of some words, as an optimizer step does."""
    for parameter in model.parameters():
        words = parameter.view(torch.int16)
        words ^= (torch.rand(words.shape) < share).to(torch.int16)


def measure_deltas(name: str, rounds: int, root: Path) -> list[str]:
    """Measure deltas of one shape and complete versions in turns, and return the row of the deltas."""
    model = make_model(SHAPES[name]._replace(dtype=torch.bfloat16), root / "model")
    ours, store = fingerprint(root / "model"), WeightStore(root / "weights")
    (store.root / "versions").mkdir(parents=True)
    files = part_files(model_table(model, torch.bfloat16), rank=0, ranks=1)
    copy, materializer = PublishedCopy(files), Materializer(store, root / "made", "bench")
    steps = iter(range(1000))
    last: tuple[Manifest, str] | None = None
    used: tuple[Path, ...] = ()

    def publish(*, is_delta: bool) -> dict[str, float]:
        nonlocal last, used
        version, parent = Version(next(steps), 1), last if is_delta else None
        change(model)
        began = time.perf_counter()
        with store.staging(version, needs_bytes=0) as staged:
            plan = Plan(version, parent[0].version if parent else None)
            digests = copy.write(staged, files, model_tensors(model, torch.bfloat16), plan=plan)
            last = store.commit(staged, version, run="bench", fingerprint=ours, digests=digests, parent=parent)
        written = time.perf_counter()
        used = materializer.make(*last, used)
        done = time.perf_counter()
        size = sum(path.stat().st_size for path in store.directory(version).glob("*.safetensors*"))
        store.retain(1)
        return {"bytes": size, "write": written - began, "read": done - written}

    sides = {"complete": partial(publish, is_delta=False), "delta": partial(publish, is_delta=True)}
    measured = alternate(sides, rounds)
    materializer.close()
    complete, delta = (
        {part: [one[part] for one in measured[side]] for part in ("bytes", "write", "read")} for side in sides
    )
    size_mb = f"{statistics.median(complete['bytes']) / 1e6:,.0f}"
    return [name, size_mb, f"{100 * statistics.median(delta['bytes']) / statistics.median(complete['bytes']):.1f} %",
            ratio(delta["write"], complete["write"]), ratio(delta["read"], complete["read"])]  # fmt: skip


PARTS = ("all", "write", "commit", "verify", "pause", "load", "retain")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
    args = parser.parse_args()
    rows: list[list[str]] = []
    deltas: list[list[str]] = []
    for shape in ["1M"] if args.quick else args.shapes:
        rounds = 1 if args.quick else args.rounds
        for table, bench in ((rows, measure), (deltas, measure_deltas)):
            with tempfile.TemporaryDirectory(dir=args.folder) as name:
                table.append(bench(shape, rounds, Path(name)))
    columns = ["model", "MB", "÷ plain write + read", "÷ `save_pretrained` + reload", *(f"{part}, s" for part in PARTS)]
    note = "Decoding stops for `pause` and `load`. `retain` deletes the version before, and is not part of `all`."
    full = Table(title="A full version", columns=columns, rows=rows, note=note)
    columns = ["model, bfloat16", "MB, complete", "bytes", "write ÷ complete", "make and verify ÷ verify complete"]
    note = (
        f"{CHANGED:.0%} of the words have changed. The volume is in memory. Across nodes, the bytes decide. "
        "For a plain write and read, see the complete versions above."
    )
    delta = Table(title="A delta version", columns=columns, rows=deltas, note=note)
    write([full, delta], args.result)


if __name__ == "__main__":
    main()
