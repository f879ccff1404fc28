"""Cases of tests/bench/gpu.py: where the time of an update goes, and what other ways to compute it would change."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # torch exports it without saying so
from torch.profiler import profile

from support import gpu
from support.gpu_bench_update import Updates, in_bfloat16, updates_of
from support.shapes import write_model
from tandem_trainer.learner import learner as learner_module
from tandem_trainer.learner import logprobs
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.logprobs import TokenLogprobs
from tandem_trainer.run.clock import PhaseClock

KERNELS, OPERATORS = 25, 12
ROUNDS = 3
"""The first warms up."""
PHASES: list[tuple[Any, str, str]] = [
    (Learner, "_micro_batches", "micro-batches"),
    (TokenLogprobs, "_hidden", "layers forward"),
    (TokenLogprobs, "_chunk", "output embedding forward"),
    (logprobs._TargetLogprobs, "forward", "softmax forward"),
    (logprobs._TargetLogprobs, "backward", "softmax backward"),
    (Accelerator, "backward", "backward"),
    (Accelerator, "clip_grad_norm_", "clip"),
    (AcceleratedOptimizer, "step", "optimizer"),
    (learner_module, "give_back_freed_memory", "give back memory"),
]
"""Owner of a function, its name, and the phase whose time it is. Phases within others count for themselves."""


def cases(shapes: list[str], folder: Path) -> list[tuple[str, Callable[[], dict[str, object]]]]:
    measured = {"phases": _in_phases, "compare": _compare, "profile": _profile}
    return [
        (f"{name} {shape}", partial(measure, shape, folder / shape))
        for shape in shapes
        if shape != "7B"
        for name, measure in measured.items()
    ]


@contextmanager
def _updates(shape: str, model_dir: Path) -> Iterator[Updates]:
    if not model_dir.is_dir():
        write_model(shape, model_dir, gpu.device())
    with updates_of(shape, model_dir, in_bfloat16({})) as updates:
        updates.update()
        yield updates


def _in_phases(shape: str, model_dir: Path) -> dict[str, object]:
    """Seconds of each phase of an update."""
    with _updates(shape, model_dir) as updates:
        update_s = gpu.timed(updates.update)
        with _phases() as phases:
            updates.update()
    in_ms = {f"{name} ms": round(1e3 * value, 1) for name, value in phases.items()}
    return {"update_s": update_s, "sum_s": sum(phases.values()), **in_ms}


def _profile(shape: str, model_dir: Path) -> dict[str, object]:
    """Kernels by their share of the GPU's time, and what the CPU does meanwhile."""
    with _updates(shape, model_dir) as updates:
        wall_s = gpu.timed(updates.update)
        with profile(acc_events=True) as profiler:
            profiled_s = gpu.timed(updates.update)
    on_gpu = gpu.device().type != "cpu"
    kernels: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:
            operators[event.key] += event.self_cpu_time_total
            runs[event.key] += event.count
        elif not event.is_user_annotation:  # these contain kernels
            kernels[event.key] += event.self_device_time_total
            runs[event.key] += event.count
    if not on_gpu:
        kernels = operators
    total_s = sum(kernels.values()) / 1e6
    copies_s = sum(time for name, time in kernels.items() if name.startswith(("Memcpy", "Memset"))) / 1e6
    driver = {name: time for name, time in operators.items() if name.startswith(("cuda", "cu"))}
    return {
        "update_s": wall_s,
        "profiled_update_s": profiled_s,
        "kernels_s": total_s,
        "kernels_per_update": total_s / wall_s,
        "memory_copies_s": copies_s,
        "launches": sum(runs[name] for name in driver if "LaunchKernel" in name),
        "kernels": {
            name[:90]: f"{time / total_s / 1e4:.1f} % {runs[name]}×" for name, time in kernels.most_common(KERNELS)
        },
        "driver_ms": _by_time(Counter(driver), runs),
        "operators_ms": _by_time(operators, runs),
    }


def _by_time(times: Counter[str], runs: Counter[str]) -> dict[str, str]:
    return {name[:60]: f"{time / 1e3:.1f} in {runs[name]}×" for name, time in times.most_common(OPERATORS)}


@contextmanager
def _phases() -> Iterator[dict[str, float]]:
    """Yield the seconds of `PHASES`. The GPU finishes each before the next, so their sum is longer than an update."""
    clock = PhaseClock()

    def around(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            gpu.synchronize()
            with clock.phase(phase):
                result = function(*arguments, **options)
                gpu.synchronize()
            return result

        return measured

    with ExitStack() as stack:
        for owner, name, phase in PHASES:
            measured: Any = around(getattr(owner, name), phase)
            is_static = isinstance(owner, type) and isinstance(vars(owner)[name], staticmethod)
            stack.enter_context(mock.patch.object(owner, name, staticmethod(measured) if is_static else measured))
        with clock.phase("other"):
            yield clock.seconds


def _compare(shape: str, model_dir: Path) -> dict[str, object]:
    """Seconds and memory of an update computed in other ways, in turns."""
    with _updates(shape, model_dir) as updates:
        ways = _ways(updates.learner)
        seconds: dict[str, list[float]] = defaultdict(list)
        peak_bytes: dict[str, int] = {}
        for _ in range(1 if shape == "tiny" else ROUNDS):
            for name, way in ways.items():
                gpu.reset_peak(empties_cache=False)
                with way():
                    seconds[name].append(gpu.timed(updates.update))
                peak_bytes[name] = gpu.peak_bytes()
    return {
        name: f"{statistics.median(values[1:] or values):.4f} s, {peak_bytes[name] / 2**30:.2f} GiB"
        for name, values in seconds.items()
    }


def _ways(learner: Learner) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    policy = learner._accelerator.unwrap_model(learner._policy)
    step = learner._step

    def within_autocast(*arguments: Any) -> Any:
        with learner._accelerator.autocast():
            return step(*arguments)

    def softmax(logits: int) -> Any:
        return mock.patch.object(logprobs, "softmax_logits", return_value=logits)

    return {
        "as it is": nullcontext,
        "softmax of 2**22 logits": lambda: softmax(2**22),
        "softmax of 2**25 logits": lambda: softmax(2**25),
        "softmax of 2**27 logits": lambda: softmax(2**27),
        "chunks of 4096 tokens": lambda: mock.patch.object(policy, "_chunk_size", 4096),
        "weights cast once per step": lambda: mock.patch.object(learner, "_step", within_autocast),
        "freed memory is kept": lambda: mock.patch.object(learner_module, "give_back_freed_memory"),
    }
