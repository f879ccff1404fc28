"""Kill this process with SIGKILL at one place of a publish, and note which weights it publishes or loads.

At the place "broken", a load raises an error instead.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar

import xxhash

from tandem_protocol import retired, store
from tandem_protocol.errors import TandemError
from tandem_protocol.version import Version

ItemT = TypeVar("ItemT")
Arm = Callable[[int], None]
"""Takes a number n. A trainer dies at the n-th time that it comes to the place, a generator with the n-th version."""


class TrainerFault(NamedTuple):
    """How a trainer publishes, and where it dies. By default it lives."""

    place: str | None = None
    number: int = 0
    delta: Literal["never", "always"] = "always"
    """`trainer.publish.delta`. With "always", the trainer dies in the publication of a version with deltas."""
    max_lag: int = 1
    """With 0, the trainer waits until a version is served. With 1, it is published behind the next update."""


_is_generator = False


def _kill() -> None:
    """Kill this process. A generator has a session of its own, and dies with its engine's process as in a container."""
    if _is_generator:
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _break() -> None:
    raise RuntimeError("a fault that a test has injected")


def _in(owner: Any, name: str, when: str, fault: Callable[[], None] = _kill) -> Arm:
    """A fault `when` ("before" or "after") the n-th call of a function, or "within" the iterable that is its last
    argument or its result."""

    def arm(number: int) -> None:
        original, calls = getattr(owner, name), count(1)

        def call(*args: Any, **options: Any) -> Any:
            is_it = next(calls) == number
            if is_it and when == "before":
                fault()
            if is_it and when == "within" and args and isinstance(args[-1], Iterable):
                args = (*args[:-1], _failing(args[-1], fault))
            result = original(*args, **options)
            if is_it and when == "within":
                return _failing(result, fault) if inspect.isgenerator(result) else result
            if is_it and when == "after":
                if not inspect.isawaitable(result):
                    fault()
                return _failing_when_done(result, fault)
            return result

        setattr(owner, name, call)

    return arm


def _failing(items: Iterable[ItemT], fault: Callable[[], None]) -> Iterator[ItemT]:
    for number, item in enumerate(items):
        if number == 5:  # of about 20 tensors
            fault()
        yield item


async def _failing_when_done(result: Any, fault: Callable[[], None]) -> None:
    await result
    fault()


def _torn(number: int) -> None:
    """Die while a small file is replaced: the manifest, `LATEST` or a lease."""
    original, calls = store._replace, count(1)

    def call(path: Path, data: bytes) -> None:
        if next(calls) == number:
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(data[: len(data) // 2])
            _kill()
        original(path, data)

    store._replace = call


def _renamed(number: int) -> None:
    """Die when a version has its name, and `LATEST` has that of the version before it.

    A commit flushes three folders: with the manifest, with the name of the version, and with `LATEST`.
    """
    _in(store, "fsync", "before")(3 * number - 1)


def _removing(number: int) -> None:
    """Die before an old version is removed."""
    copy: Any = SimpleNamespace(**vars(shutil))
    vars(retired)["shutil"] = copy  # only this module gets this copy
    _in(copy, "rmtree", "before")(number)


def _from_version(arm: Arm, *, of_deltas: bool = False) -> Arm:
    """Let a generator die when it comes to the place after it has begun to read the n-th version.

    The first version may be the one that it starts with. The others come from the trainer. With `of_deltas`, only
    versions that are made out of deltas count.
    """
    from tandem_generator.stored_versions import StoredVersions

    owner: Any = StoredVersions  # its method is replaced in this process only, which dies

    def armed(number: int) -> None:
        original = StoredVersions.read
        found: set[Version] = set()

        async def read(self: StoredVersions, version: Version, **options: Any) -> Any:
            with suppress(TandemError):  # it may have been deleted
                if self._store.read(version)[0].delta or not of_deltas:
                    found.add(version)
            if len(found) < number:
                return await original(self, version, **options)
            owner.read = original
            arm(1)
            return await owner.read(self, version, **options)

        owner.read = read

    return armed


def _trainer_places() -> dict[str, Arm]:
    from tandem_rollout.client import GeneratorClient
    from tandem_trainer import publication, publish, published_copy
    from tandem_trainer.devices import HostMemory

    return {
        "gather": _in(publish, "model_tensors", "within"),
        "copied": _in(HostMemory, "wait", "after"),
        "write": _in(publication, "write_files", "within"),
        "renamed": _renamed,
        "committed": lambda number: _in(store, "_replace", "after")(2 * number),  # the manifest, then `LATEST`
        "served": _in(GeneratorClient, "set_weights", "after"),
        "retain": _removing,
        "delta made": _in(published_copy, "encode", "after"),
        "delta written": _in(published_copy.PublishedCopy, "_write", "after"),
    }


def _engine(name: str) -> tuple[Any, Callable[..., Arm]]:
    """The class of an engine, and what makes a fault in the middle of its n-th load."""
    if name == "mock":
        from tandem_generator.engines import mock

        return mock.MockEngine, partial(_in, mock, "read_header", "after")
    from tandem_generator import volume_engine
    from tandem_generator.engines.vllm import VllmEngine

    def in_load(**options: Any) -> Arm:
        arm = _in(volume_engine, "_tensors", "within", **options)
        return lambda number: arm(number + 1)  # the first load is the rehearsal's

    return VllmEngine, in_load


def _generator_places(engine_name: str) -> dict[str, Arm]:
    from tandem_generator import materializer
    from tandem_generator.stored_versions import StoredVersions

    engine, in_load = _engine(engine_name)
    places: dict[str, Arm] = {
        "visible": _in(StoredVersions, "read", "before"),
        "lease torn": _torn,
        "verified": _in(store, "verify_files", "after"),
        "pause": _in(engine, "pause", "after"),
        "load": in_load(),
        "resume": _in(engine, "resume", "after"),
        "delta space": _in(materializer.Materializer, "_space", "after"),
        "delta applied": _in(materializer, "_apply", "after"),
        "delta complete": _in(materializer.Materializer, "_made", "after"),
    }
    found = {name: _from_version(arm) for name, arm in places.items()}
    if engine_name == "vllm":  # the engine's process gets its fault at the start
        found["load"] = in_load()
    return found | {f"{name} of deltas": _from_version(arm, of_deltas=True) for name, arm in places.items()}


TRAINER = ("gather", "copied", "write", "renamed", "committed", "served", "retain")
# The copy of the last version writes deltas, so a trainer does not come to "write". "delta written" takes its place.
DELTA_TRAINER = ("gather", "copied", "delta made", "delta written", "renamed", "committed", "served", "retain")
GENERATOR = ("visible", "lease torn", "verified", "pause", "load", "resume")
# A file that is made out of deltas is checked before "delta applied", so such versions do not come to "verified".
DELTA_GENERATOR = (
    "delta space", "delta applied", "delta complete",
    *(f"{place} of deltas" for place in GENERATOR if place != "verified"),
)  # fmt: skip
# With vLLM, the places that both kinds have are taken as they come.
VLLM_GENERATOR = (*GENERATOR, *(place for place in DELTA_GENERATOR if place.startswith("delta")))
NOT_BEHIND = frozenset({"copied"})
"""Places to which a trainer with `max_lag` 0 does not come. It writes the tensors of the model, without a copy."""


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


def arm_trainer(file: Path, fault: TrainerFault, policies: Path | None = None) -> None:
    """Note in `file` what this trainer publishes, and die at the fault's place.

    With `policies`, the tensors of each version are saved into this folder as well.
    """
    from support.published_policies import save
    from tandem_trainer import publish
    from tandem_trainer.learner.safetensors_file import data_of
    from tandem_trainer.learner.shards import model_tensors

    os.environ["TANDEM__TRAINER__PUBLISH__DELTA"] = fault.delta
    os.environ["TANDEM__TRAINER__MAX_LAG"] = str(fault.max_lag)
    arm = partial(_trainer_places()[fault.place], fault.number) if fault.place else None
    if arm and fault.delta == "never":
        arm()
    call, publications = publish.Publisher.__call__, count(1)

    def publishing(self: Any, model: Any, step: int, **options: Any) -> Version:
        version = Version(step, self._attempt)
        tensors = dict(model_tensors(model, self._dtype))
        if policies:
            save(policies, version, tensors)
        note(file, version, {name: bytes(data_of(tensor)) for name, tensor in tensors.items()})
        if arm and next(publications) == 2 and fault.delta == "always":  # the first version of an attempt has no deltas
            arm()
        return call(self, model, step, **options)

    publish.Publisher.__call__ = publishing  # type: ignore[method-assign]  # in this process only, which dies


def run_generator() -> None:
    """A generator that notes what it loads. Its arguments: file, place, number, and those of the generator."""
    from safetensors import deserialize

    from tandem_generator.__main__ import main

    global _is_generator
    _is_generator = True
    file, place, number, *arguments = sys.argv[1:]
    engine_name = arguments[arguments.index("--engine") + 1]
    engine, in_load = _engine(engine_name)
    load_weights = engine.load_weights

    async def loading(self: Any, version: Version, files: Any) -> None:
        tensors = [tensor for one in files for tensor in deserialize(one.read_bytes())]  # type: ignore[no-untyped-call]  # safetensors declares no types for it
        note(Path(file), version, {name: bytes(content["data"]) for name, content in tensors})
        await load_weights(self, version, files)

    engine.load_weights = loading  # in this process only, which dies
    if place == "broken":
        in_load(fault=_break)(int(number))
    elif place != "none":
        _generator_places(engine_name)[place](int(number))
    sys.exit(main(arguments))
