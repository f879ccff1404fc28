"""Break the load of a version at each of its points, then load the old version again, and compare all bytes.

`python -m support.load_breaks FOLDER FAMILY …` prints one line for each break: `{"family", "point", "result"}`. It also
rehearses a switch in the right way and in wrong ones: `{"family", "way", "result"}`. Each of these happens in a process
of its own, so that what it leaves behind does not affect the next one.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm.v1.worker.cpu.shm  # noqa: F401 - replaces functions of torch.accelerator that need a GPU
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload import layerwise

from support.architectures import tiny_config, tiny_model
from tandem_generator import plugin, volume_engine
from tandem_generator.switch_rehearsal import _tensors
from tandem_generator.volume_engine import RepackingVolumeWeightEngine, VolumeInitInfo, VolumeUpdateInfo

CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 40},  # vLLM pads these experts
    "qwen2_moe": {"moe_intermediate_size": 40},
}
TIED = "mixtral"
"""Family whose model shares one matrix between its embeddings. Its files have both, as some on the hub have."""
LAYERWISE = ("initialize_online_processing", "_layerwise_process", "_place_kernel_tensors", "_finalize_attention_layer")
"""Functions of vLLM's layerwise reload, which break at each of their calls."""

WAYS = (
    "right", "without safetensors", "without new kernels", "in place", "without tensor 0.self_attn.q_proj",
    "without tensor 1.mlp.experts.2.up_proj",
)  # fmt: skip
"""Ways of loading a version. Without safetensors, vLLM's own loader reads the base weights."""

Point = tuple[str, int]
"""What breaks, and at which of its calls."""


class Broken(Exception):
    """The injected failure."""


class Counted:
    """Counts the calls of a function, and breaks one of them."""

    def __init__(self, function: Callable[..., Any], break_at: int | None) -> None:
        self.function, self.break_at, self.calls = function, break_at, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.break_at:
            raise Broken
        return self.function(*arguments)


def main() -> None:
    torch.set_num_threads(1)
    plugin.register()
    folder = Path(sys.argv[1])
    in_child(partial(rehearse_tied, folder / "tied"))
    for family in sys.argv[2:]:
        in_child(partial(break_everywhere, family, folder / family))


def in_child(job: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        try:
            job()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)


def break_everywhere(family: str, folder: Path) -> None:
    model = tiny_model(tiny_config(family, **CHANGES.get(family, {})))
    model.save_pretrained(folder / "base")
    (folder / "next").mkdir()
    base = load_file(folder / "base/model.safetensors")
    save_file({name: tensor * 1.5 + 0.25 for name, tensor in base.items()}, folder / "next/model.safetensors")
    engine = build(folder / "base")
    for point in points(engine, folder):
        in_child(partial(report, family, point, engine, folder))
    table = {name: list(tensor.shape) for name, tensor in base.items()}
    for way in WAYS:
        in_child(partial(report_rehearsal, family, way, engine, table, folder))


def rehearse_tied(folder: Path) -> None:
    """Rehearse with a vocabulary that vLLM pads, of which a load fills a part."""
    model = tiny_model(tiny_config(TIED, tie_word_embeddings=True, vocab_size=100))
    model.save_pretrained(folder / "base")
    file = folder / "base/model.safetensors"
    base = load_file(file)
    table = {name: list(tensor.shape) for name, tensor in base.items()}
    assert "lm_head.weight" not in table
    save_file(base | {"lm_head.weight": base["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    report_rehearsal(f"{TIED}, tied", "right", build(folder / "base"), table, folder)


def build(folder: Path) -> RepackingVolumeWeightEngine:
    """Load a model with vLLM as a worker does, without an engine."""
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=128,
        block_size=32,
    )  # fmt: skip
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)
    return RepackingVolumeWeightEngine(None, config, torch.device("cpu"), model)


def points(engine: RepackingVolumeWeightEngine, folder: Path) -> Iterator[Point]:
    """Yield every point where a load may break: each tensor that is read, and each call of a part of vLLM."""
    reading, writing = os.pipe()

    def count() -> None:
        counted = instrument(("", 0))
        load(engine, folder / "next")
        os.write(writing, json.dumps({name: function.calls for name, function in counted.items()}).encode())

    in_child(count)
    calls: dict[str, int] = json.loads(os.read(reading, 1 << 16))
    for name, number in calls.items():
        yield from ((name, call) for call in range(number))


def instrument(point: Point) -> Mapping[str, Counted]:
    """Count the calls of everything that may break in this process, and break one of them."""
    counted: dict[str, Counted] = {}

    def wrap(name: str, function: Callable[..., Any]) -> Counted:
        counted[name] = Counted(function, point[1] if point[0] == name else None)
        return counted[name]

    read = wrap("tensor", lambda pair: pair)
    tensors = volume_engine._tensors

    def broken(shards: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return map(read, tensors(shards))

    volume_engine._tensors = broken
    for name in LAYERWISE:
        setattr(layerwise, name, wrap(name, getattr(layerwise, name)))
    for method in processing():
        process = wrap(f"process of {method.__name__}", method.process_weights_after_loading)
        method.process_weights_after_loading = lambda *arguments, process=process: process(*arguments)
    return counted


def processing() -> list[Any]:
    """Return the classes of vLLM that convert the weights of a layer, in a fixed order."""
    found = {cls for cls in _subclasses(QuantizeMethodBase) if "process_weights_after_loading" in vars(cls)}
    return sorted(found, key=lambda cls: cls.__name__)


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def load(engine: RepackingVolumeWeightEngine, folder: Path) -> None:
    engine.receive_weights(VolumeUpdateInfo([str(folder / "model.safetensors")]))


def report_rehearsal(
    family: str, way: str, engine: RepackingVolumeWeightEngine, table: dict[str, list[int]], folder: Path
) -> None:
    if way == "without new kernels":
        engine._before_layerwise = lambda: None  # type: ignore[method-assign]  # this way breaks it
    if way == "in place":
        engine._load_layerwise = engine.model.load_weights  # type: ignore[method-assign]  # this way breaks it
    if way.startswith("without tensor "):
        table = {name: shape for name, shape in table.items() if way.rpartition(" ")[2] not in name}
    info = VolumeInitInfo(switches=True, table=table, shards=[str(folder / "base/model.safetensors")])
    if way == "without safetensors":
        info.shards = []
    try:
        engine.init_transfer_engine(info)
        said = ""
    except ValueError as error:
        said = str(error)
    print(json.dumps({"family": family, "way": way, "result": said}), flush=True)


def report(family: str, point: Point, engine: RepackingVolumeWeightEngine, folder: Path) -> None:
    print(json.dumps({"family": family, "point": list(point), "result": result(point, engine, folder)}), flush=True)


def result(point: Point, engine: RepackingVolumeWeightEngine, folder: Path) -> str:
    """Return `restored`, or what is wrong after the old version was loaded again."""
    before = contents(engine)
    instrument(point)
    try:
        load(engine, folder / "next")
        return "the load did not break"
    except Broken:
        pass
    try:
        load(engine, folder / "base")
    except Exception as error:
        return f"the old version cannot be loaded again: {error!r}"
    after = contents(engine)
    if different := [name for name in before if before[name] != after.get(name)]:
        return f"{different[0]} differs"
    packed = all(module.quant_method.moe_kernel is not None for module in experts(engine))
    return "restored" if packed else "experts without a kernel"


def experts(engine: RepackingVolumeWeightEngine) -> list[Any]:
    return [module for module in engine.model.modules() if hasattr(getattr(module, "quant_method", None), "moe_kernel")]


def contents(engine: RepackingVolumeWeightEngine) -> dict[str, bytes]:
    """Return the bytes of all tensors of the model. A tensor without data has none."""
    return {
        name: b"" if tensor.is_meta else tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in _tensors(engine.model)
    }


if __name__ == "__main__":
    main()
