"""A trainer that publishes deltas of synthetic bfloat16 updates, with the trainer's own code but without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from support.weights import FINGERPRINT
from tandem_generator.materializer import Materializer
from tandem_protocol.chains import is_complete
from tandem_protocol.manifest import Manifest
from tandem_protocol.messages import PROTOCOL_VERSION, ServedWeights, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.learner.safetensors_file import write_files
from tandem_trainer.learner.shards import model_tensors
from tandem_trainer.published_copy import Plan, PublishedCopy

SHAPES = {"scale.weight": (7,), "embed.weight": (64, 31), "layer.weight": (33, 65), "head.weight": (5, 5)}
FILES = {"model-00001-of-00002.safetensors": ("scale.weight", "embed.weight"),
         "model-00002-of-00002.safetensors": ("layer.weight", "head.weight")}  # fmt: skip


class Trainer:
    """Publishes every version into `store`, and writes all of them in full into the folder `reference`."""

    def __init__(self, store: WeightStore, *, share: float = 0.02) -> None:
        self.store, self.reference = store, store.root / "reference"
        (store.root / "versions").mkdir(parents=True, exist_ok=True)
        self.share = share
        self.chance = torch.Generator().manual_seed(0)
        self.words = {name: torch.randint(-(2**15), 2**15, shape, generator=self.chance, dtype=torch.int16)
                      for name, shape in SHAPES.items()}  # fmt: skip
        meta = {name: tensor.view(torch.bfloat16).to("meta") for name, tensor in self.words.items()}
        self.files = {file: {name: meta[name] for name in names} for file, names in FILES.items()}
        self.copy = PublishedCopy(self.files)
        self.last: tuple[Manifest, str] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: words.view(torch.bfloat16) for name, words in self.words.items()}

    def update(self) -> None:
        """Change some bits of some words. The results include -0.0, infinities and NaN with payloads."""
        for name, words in self.words.items():
            mask = torch.rand(words.shape, generator=self.chance) < self.share
            new = torch.randint(-(2**15), 2**15, words.shape, generator=self.chance, dtype=torch.int16)
            self.words[name] = torch.where(mask, new, words)

    def publish(self, version: Version, *, full: bool = False, complete: bool = False) -> tuple[Manifest, str]:
        """Publish the weights as they are."""
        parent = None if full else self.last
        plan = Plan(version, parent[0].version if parent else None, complete)
        with self.store.staging(version, needs_bytes=0) as staged:
            digests = self.copy.write(staged, self.files, self.tensors.items(), plan=plan)
            self.last = self.store.commit(
                staged, version, run="test", fingerprint=FINGERPRINT, digests=digests, parent=parent
            )
        (folder := self.reference / str(version)).mkdir(parents=True)
        write_files(folder, self.files, self.tensors.items())
        return self.last

    def steps(self, count: int, *, attempt: int = 1) -> list[tuple[Manifest, str]]:
        """Publish a complete version and `count` deltas."""
        found = [self.publish(Version(1, attempt), full=True)]
        for step in range(2, count + 2):
            self.update()
            found.append(self.publish(Version(step, attempt)))
        return found

    def complete(self, manifest: Manifest) -> None:
        """Add the complete files of the last version."""
        with self.store.staging(manifest.version, needs_bytes=0, completes=True) as staged:
            self.copy.write_complete(staged)
            self.store.complete(manifest, staged)

    def is_right(self, files: tuple[Path, ...], version: Version) -> bool:
        """Whether files have exactly the bytes of the version that was published in full."""
        expected = {path.name: path.read_bytes() for path in (self.reference / str(version)).iterdir()}
        return {path.name: path.read_bytes() for path in files} == expected


class Replica:
    """Makes versions as a generator does. Keeps the files of the version that it serves."""

    def __init__(self, store: WeightStore, folder: Path, name: str = "g") -> None:
        self.materializer = Materializer(store, folder, name)
        self.files: tuple[Path, ...] = ()

    def switch(self, manifest: Manifest, digest: str) -> tuple[Path, ...]:
        self.files = self.materializer.make(manifest, digest, self.files)
        return self.files

    def kill(self) -> None:
        """Leave everything as a process that is killed does: its files stay, and the kernel releases its lock."""
        if self.materializer._unlock:
            self.materializer._unlock()


def everything(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Generators:
    """Stands in for the client: replicas that make every version. One that is late begins with a later version."""

    def __init__(self, store: WeightStore, folder: Path) -> None:
        self.protocols = SimpleNamespace(oldest=PROTOCOL_VERSION)
        self.store, self.folder = store, folder
        self.replicas = {"a": Replica(store, folder, "a")}
        self.asked: list[Version] = []
        self.refuses: Exception | None = None
        self.on_stale: Any = None

    def join(self, name: str) -> None:
        self.replicas[name] = Replica(self.store, self.folder, name)

    async def expect(self, version: Version) -> None: ...

    async def set_weights(self, version: Version, weights: SetWeights, timeout_s: float) -> dict[str, ServedWeights]:
        self.asked.append(version)
        manifest, digest = self.store.read(version)
        assert digest == weights.manifest_digest
        if self.refuses:
            raise self.refuses
        for replica in self.replicas.values():
            replica.switch(manifest, digest)
        return {}

    def tensors(self, name: str = "a") -> dict[str, torch.Tensor]:
        return {key: value for file in self.replicas[name].files for key, value in load_file(file).items()}


def has_delta(store: WeightStore, version: Version) -> bool:
    manifest, _ = store.read(version)
    store.verify(manifest)
    assert bool(manifest.delta) == (manifest.format == 2)
    return manifest.delta is not None


def needs_parent(store: WeightStore, version: Version) -> bool:
    return not is_complete(store, store.read(version)[0])


@torch.no_grad()
def update(model: PreTrainedModel, share: float = 0.01) -> None:
    for parameter in model.parameters():
        mask = torch.rand(parameter.shape) < share
        parameter[mask] = torch.randn(int(mask.sum()))


def is_served(generators: Generators, model: PreTrainedModel, name: str = "a") -> bool:
    served = generators.tensors(name)
    expected = dict(model_tensors(model, torch.bfloat16))
    return served.keys() == expected.keys() and all(
        torch.equal(served[key].view(torch.int16), expected[key].view(torch.int16)) for key in expected
    )
