"""Compare ways to write, verify and load the files of a version, in turns. It needs no engine.

    python tests/bench/volume_files.py [--megabytes 512] [--rounds 7] [--folders /dev/shm .]

A row is the time of one way ÷ that of the way that Tandem uses, as a ratio of medians. In a cold row the files are not
in the page cache before. docs/reference/measured.md says what was kept.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.bench import Table, alternate, options, ratio, write
from tandem_protocol.manifest import Digest, digest_file
from tandem_protocol.verification import THREADS
from tandem_trainer.learner.safetensors_file import CHUNK_BYTES, header_of

FILES = 8
MATRIX = (1024, 1024)


def write_one(path: Path, data: memoryview, *, allocates: bool, unnamed: bool, twice: bool) -> None:
    flags = os.O_TMPFILE | os.O_RDWR if unnamed else os.O_CREAT | os.O_TRUNC | os.O_WRONLY
    descriptor = os.open(path.parent if unnamed else path, flags, 0o644)
    if allocates:
        os.posix_fallocate(descriptor, 0, len(data))
    digest = Digest()
    for start in range(0, len(data), CHUNK_BYTES):
        digest.update(data[start : start + CHUNK_BYTES])
        os.write(descriptor, data[start : start + CHUNK_BYTES])
    os.fsync(descriptor)
    if unnamed:
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)  # with a folder, Python follows the link
    if twice:
        os.fsync(descriptor)
    os.close(descriptor)


def write_all(
    paths: list[Path], data: list[memoryview], *, allocates: bool = False, unnamed: bool = False, twice: bool = False
) -> None:
    one = partial(write_one, allocates=allocates, unnamed=unnamed, twice=twice)
    with ThreadPoolExecutor(len(paths)) as threads:
        list(threads.map(one, paths, data))


def digest_mapped(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        return Digest(mapped).hexdigest()


def verify(paths: list[Path], digest: Callable[[Path], str]) -> None:
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(digest, paths))


def load(model: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        model[name].copy_(tensor)


def tensors_of(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def reading_ahead(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The same, while a thread has the kernel read the next file."""
    with ThreadPoolExecutor(1) as reader:
        for path, following in zip(paths, [*paths[1:], None], strict=True):
            if following is not None:
                reader.submit(read_ahead, following)
            yield from tensors_of([path])


def read_ahead(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def verify_and_load_one_mapping(
    model: Mapping[str, Tensor], paths: list[Path], tables: list[dict[str, Tensor]]
) -> None:
    mapped = [np.memmap(path, np.uint8, "c") for path in paths]
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda file: Digest(file.data).hexdigest(), mapped))
    for file, table in zip(mapped, tables, strict=True):
        start = len(header_of(table))
        for name, tensor in table.items():
            part = torch.from_numpy(file[start : start + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
            model[name].copy_(part)
            start += tensor.nbytes


def verify_and_load(model: Mapping[str, Tensor], paths: list[Path]) -> None:
    verify(paths, digest_file)
    load(model, tensors_of(paths))


def timed(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    before()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def forget(paths: list[Path]) -> None:
    """Drop the files from the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def measure(folder: Path, megabytes: int, rounds: int) -> list[list[str]]:
    count = max(1, megabytes // 4 // FILES)
    names = iter(f"layer.{number}.weight" for number in range(count * FILES))
    tables = [{next(names): torch.empty(MATRIX, device="meta") for _ in range(count)} for _ in range(FILES)]
    model = {name: torch.zeros(MATRIX) for table in tables for name in table}
    bodies = [torch.randn(count, *MATRIX).view(torch.uint8).numpy().tobytes() for _ in range(FILES)]
    data = [memoryview(header_of(table) + body) for table, body in zip(tables, bodies, strict=True)]
    paths = [folder / f"{number}.safetensors" for number in range(FILES)]
    steps: dict[str, dict[str, Callable[[], float]]] = {"write": {}}
    options_of = {"now": "", "posix_fallocate": "allocates", "O_TMPFILE": "unnamed", "second fsync": "twice"}
    for way, option in options_of.items():
        written = partial(write_all, paths, data, **({option: True} if option else {}))
        steps["write"][way] = partial(timed, written, partial(remove, paths))
    for state, before in (("", lambda: None), (", cold", partial(forget, paths))):
        if state and str(folder).startswith("/dev/shm"):
            continue
        steps[f"verify{state}"] = {
            "now": partial(timed, partial(verify, paths, digest_file), before),
            "of a mapping": partial(timed, partial(verify, paths, digest_mapped), before),
        }
        steps[f"load{state}"] = {
            "now": partial(timed, lambda: load(model, tensors_of(paths)), before),
            "reading ahead": partial(timed, lambda: load(model, reading_ahead(paths)), before),
        }
        steps[f"verify and load{state}"] = {
            "now": partial(timed, partial(verify_and_load, model, paths), before),
            "one mapping": partial(timed, partial(verify_and_load_one_mapping, model, paths, tables), before),
        }
    rows = []
    for step, sides in steps.items():
        seconds = alternate(sides, rounds)
        base = f"{sorted(seconds['now'])[rounds // 2]:.3f}"
        rows += [[f"{step}: {way}", ratio(seconds[way], seconds["now"]), base] for way in sides if way != "now"]
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folders", nargs="+", default=["/dev/shm", tempfile.gettempdir()])
    args = parser.parse_args()
    tables, megabytes = [], 32 if args.quick else args.megabytes
    for root in args.folders:
        with tempfile.TemporaryDirectory(dir=root) as name:
            rows = measure(Path(name), megabytes, 1 if args.quick else args.rounds)
        columns = ["step: way", "÷ as Tandem does it", "as Tandem does it, s"]
        tables.append(Table(title=f"{root}, {megabytes} MB in {FILES} files", columns=columns, rows=rows))
    write(tables, args.result)


if __name__ == "__main__":
    main()
