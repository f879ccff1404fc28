"""Kill this process with SIGKILL at one place of a publish, and note which weights it publishes or loads."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import xxhash

from tandem_protocol import store
from tandem_protocol.version import Version

ItemT = TypeVar("ItemT")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in(owner: Any, name: str, when: str) -> Callable[[int], None]:
    """A fault `when` ("before" or "after") the n-th call of a function, or "within" the iterable that is its last
    argument or its result."""

    def arm(number: int) -> None:
        original, calls = getattr(owner, name), count(1)

        def call(*args: Any, **options: Any) -> Any:
            is_it = next(calls) == number
            if is_it and when == "before":
                _kill()
            if is_it and when == "within" and args and isinstance(args[-1], Iterable):
                args = (*args[:-1], _killing(args[-1]))
            result = original(*args, **options)
            if is_it and when == "within":
                return _killing(result) if inspect.isgenerator(result) else result
            if is_it and when == "after":
                if not inspect.isawaitable(result):
                    _kill()
                return _killing_when_done(result)
            return result

        setattr(owner, name, call)

    return arm


def _killing(items: Iterable[ItemT]) -> Iterator[ItemT]:
    for number, item in enumerate(items):
        if number == 5:  # of about 20 tensors
            _kill()
        yield item


async def _killing_when_done(result: Any) -> None:
    await result
    _kill()


def _torn(number: int) -> None:
    """Die while a small file is replaced: the manifest, `LATEST` or a lease."""
    original, calls = store._replace, count(1)

    def call(path: Path, data: bytes) -> None:
        if next(calls) == number:
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(data[: len(data) // 2])
            _kill()
        original(path, data)

    store._replace = call


def _removing(number: int) -> None:
    """Die before the store removes a folder."""
    copy: Any = SimpleNamespace(**vars(shutil))
    vars(store)["shutil"] = copy  # only the store gets this copy
    _in(copy, "rmtree", "before")(number)


def _trainer_places() -> dict[str, Callable[[int], None]]:
    from tandem_rollout.client import GeneratorClient
    from tandem_trainer import publication, publish, published_copy
    from tandem_trainer.devices import HostMemory

    return {
        "gather": _in(publish, "model_tensors", "within"),
        "copied": _in(HostMemory, "wait", "after"),
        "write": _in(publication, "write_files", "within"),
        "committed": _in(store, "_replace", "after"),
        "served": _in(GeneratorClient, "set_weights", "after"),
        "retain": _removing,
        "delta made": _in(published_copy, "encode", "after"),
        "delta written": _in(published_copy.PublishedCopy, "_write", "after"),
    }


def _generator_places() -> dict[str, Callable[[int], None]]:
    from tandem_generator import materializer
    from tandem_generator.engines import mock
    from tandem_generator.stored_versions import StoredVersions

    return {
        "visible": _in(StoredVersions, "read", "before"),
        "lease torn": _torn,
        "verified": _in(store, "verify_files", "after"),
        "pause": _in(mock.MockEngine, "pause", "after"),
        "load": _in(mock, "read_header", "after"),
        "resume": _in(mock.MockEngine, "resume", "after"),
        "delta space": _in(materializer.Materializer, "_space", "after"),
        "delta applied": _in(materializer, "_apply", "after"),
        "delta complete": _in(materializer.Materializer, "_made", "after"),
    }


TRAINER, GENERATOR = (tuple(name for name in places if "delta" not in name)
                      for places in (_trainer_places(), _generator_places()))  # fmt: skip
DELTA_TRAINER = ("delta made", "delta written", "committed", "retain")
DELTA_GENERATOR = ("delta space", "delta applied", "delta complete")


def digest(tensors: Mapping[str, bytes]) -> str:
    """Digest of tensors' bytes with their names."""
    hasher = xxhash.xxh3_128()
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name])
    return hasher.hexdigest()


def note(file: Path, version: Version, tensors: Mapping[str, bytes]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps([str(version), digest(tensors)]) + "\n")


def noted(file: Path) -> list[tuple[str, str]]:
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]


def arm_trainer(file: Path, place: str | None, number: int) -> None:
    """Note in `file` what this trainer publishes, and die at the `number`-th time that it comes to `place`."""
    from tandem_trainer import publish
    from tandem_trainer.learner.safetensors_file import data_of
    from tandem_trainer.learner.shards import model_tensors

    call = publish.Publisher.__call__

    def publishing(self: Any, model: Any, step: int, **options: Any) -> Version:
        tensors = {name: bytes(data_of(tensor)) for name, tensor in model_tensors(model, self._dtype)}
        note(file, Version(step, self._attempt), tensors)
        return call(self, model, step, **options)

    publish.Publisher.__call__ = publishing  # type: ignore[method-assign]  # in this process only, which dies
    if place:
        _trainer_places()[place](number)


def run_generator() -> None:
    """A mock generator that notes what it loads. Its arguments: file, place, number, and those of the generator."""
    from safetensors import deserialize

    from tandem_generator.__main__ import main
    from tandem_generator.engines.mock import MockEngine

    file, place, number, *arguments = sys.argv[1:]
    load_weights = MockEngine.load_weights

    async def loading(self: Any, version: Version, files: Any) -> None:
        tensors = [tensor for one in files for tensor in deserialize(one.read_bytes())]  # type: ignore[no-untyped-call]  # safetensors'
        note(Path(file), version, {name: bytes(content["data"]) for name, content in tensors})
        await load_weights(self, version, files)

    MockEngine.load_weights = loading  # type: ignore[method-assign]  # in this process only, which dies
    if place != "none":
        _generator_places()[place](int(number))
    sys.exit(main(arguments))
