"""Measure how much sooner delta versions are served than complete ones, on network volumes of several speeds.

    python tests/bench/delta_volume.py [--speeds 100 500 1000] [--shares 0.005 0.02] [--rounds 5] [--folder /dev/shm]

The volume is sshfs between hosts that are network namespaces (support/slow_volume.py). The trainer's own publisher
writes through one mount. A mock generator, which is another process, reads through another mount, makes the complete
files in memory, verifies and serves them. Three such pairs take turns: one for each value of `trainer.publish.delta`.
The model has the shape of SmolLM2-135M in bfloat16. A simulated step changes a bit of the stated share of its words.

It needs root, sshfs and OpenSSH's file server, so it is not part of `make bench`. A speed takes one to three minutes.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.publish import SHAPES, change, make_model
from support.bench import Table, alternate, options, ratio, write
from support.gpu_publish import publisher
from support.slow_volume import missing, mounted

PLAIN_BYTES = 1 << 28
WARM_UP = {"never": 1, "always": 4, "auto": 7}
"""Versions before the measured ones. Later versions overwrite files that the generator has, and `auto` has decided."""

Report = dict[str, float]


def plain_speeds(written: Path, seen: Path) -> list[float]:
    """MB/s of writing a file through one mount, flush included, and of reading it through the other one."""
    began = time.perf_counter()
    with (written / "plain").open("wb", buffering=0) as file:
        for _ in range(PLAIN_BYTES >> 20):
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    done = time.perf_counter()
    with (seen / "plain").open("rb", buffering=0) as file:
        while file.readinto(bytearray(1 << 20)):
            pass
    read = time.perf_counter()
    (written / "plain").unlink()
    return [PLAIN_BYTES / 1e6 / seconds for seconds in (done - began, read - done)]


def measure(model: LlamaForCausalLM, root: Path, speed: int, shares: Sequence[float], rounds: int) -> list[list[str]]:
    """Measure one volume, and return a row for each share of changed words. Speed 0: the folder itself, in memory."""
    accelerator = Accelerator(cpu=True)
    (backing := root / "backing").mkdir()
    written, seen = (root / "trainer", root / "generator") if speed else (backing, backing)
    with ExitStack() as stack:
        if speed:
            stack.enter_context(mounted(backing, (written, seen), speed * 1e6))
        speeds = " / ".join(f"{value:,.0f}" for value in plain_speeds(written, seen))
        sides = {mode: _side(stack, model, mode, root, written / mode, seen / mode, accelerator) for mode in WARM_UP}
        for mode, publish in sides.items():
            for _ in range(WARM_UP[mode]):
                publish(shares[0])
        rows = []
        for share in shares:
            # The sides share the model, so all of them change it between two versions of one.
            turns = {mode: partial(publish, share / len(sides)) for mode, publish in sides.items()}
            rows.append([f"{speed} MB/s" if speed else "memory", speeds, f"{100 * share:g} %",
                         *_cells(alternate(turns, rounds, warm_up=0))])  # fmt: skip
        return rows


def _side(
    stack: ExitStack,
    model: LlamaForCausalLM,
    mode: str,
    root: Path,
    written: Path,
    seen: Path,
    accelerator: Accelerator,
) -> Callable[[float], Report]:
    """Start a generator. Returns what changes a share of the model's words, publishes it, and says how long it took."""
    reports: list[Report] = []
    publish, _ = stack.enter_context(
        publisher(
            model, root / "model", written, accelerator, dtype=torch.bfloat16, mock=True, seen=seen / "weights",
            made=root / "made" / mode, delta=mode,
            report=lambda timings, size: reports.append({**timings, "bytes": float(size)}),
        )
    )  # fmt: skip

    def side(share: float) -> Report:
        change(model, share)
        publish(model, len(reports))
        return reports[-1]

    return side


def _cells(measured: dict[str, list[Report]]) -> list[str]:
    """Seconds and bytes of complete versions and of deltas, their ratio, and what `auto` chose."""
    of = {mode: {part: [one[part] for one in reports] for part in reports[0]} for mode, reports in measured.items()}
    cells = []
    for mode in ("never", "always"):
        middle = {part: statistics.median(values) for part, values in of[mode].items()}
        cells += [f"{middle['total_s']:.2f}", f"{middle['write_s']:.2f} + {middle['verify_s']:.2f}",
                  f"{middle['bytes'] / 1e6:,.1f}"]  # fmt: skip
    is_delta = max(of["auto"]["bytes"]) < min(of["never"]["bytes"])
    chosen = "delta" if is_delta else "complete"
    return [*cells, ratio(of["never"]["total_s"], of["always"]["total_s"]),
            f"{chosen}, {statistics.median(of['auto']['total_s']):.2f}"]  # fmt: skip


COLUMNS = [
    *("volume", "plain write / read, MB/s", "changed"),
    *("complete, s", "write + verify", "MB", "delta, s", "write + verify", "MB"),
    *("complete ÷ delta", "`auto`, s"),
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--speeds", nargs="+", type=int, default=[0, 100, 500, 1000], help="MB/s; 0 is memory")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.005, 0.02])
    parser.add_argument("--folder", default="/dev/shm", help="folder in memory")
    args = parser.parse_args()
    if any(args.speeds) and (reason := missing()):
        sys.exit(f"skipped: {reason}")
    rows: list[list[str]] = []
    for speed in args.speeds:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            root = Path(name)
            model = make_model(SHAPES["135M"]._replace(dtype=torch.bfloat16), root / "model")
            rows += measure(
                model, root, speed, args.shares[:1] if args.quick else args.shares, 1 if args.quick else args.rounds
            )
            print(" | ".join(rows[-1]), flush=True)
    note = f"Seconds until a version is served. Load average at the end: {os.getloadavg()[0]:.1f}."
    write([Table(title="Network volumes", columns=COLUMNS, rows=rows, note=note)], args.result)


if __name__ == "__main__":
    main()
