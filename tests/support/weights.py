"""Create versions in a weight store, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tandem_protocol.manifest import ADAPTER_CONFIG_NAME, MANIFEST_NAME, Manifest
from tandem_protocol.messages import ModelFingerprint
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

FINGERPRINT = ModelFingerprint(config="c0", tokenizer="70", parameters="9a")


def tensors(step: int) -> dict[str, np.ndarray]:
    """Return two small tensors in which every value is `step`."""
    return {"embed.weight": np.full((8, 4), step, np.float32), "norm.weight": np.full(4, step, np.float32)}


def publish(
    store: WeightStore, version: Version, *, run: str = "test", digests: Mapping[str, str] | None = None
) -> tuple[Manifest, str]:
    """Commit `tensors(version.step)` as `version`, one shard per tensor. Needs no writer lock."""
    (store.root / "versions").mkdir(parents=True, exist_ok=True)
    with store.staging(version, needs_bytes=1 << 12) as staged:
        for number, (name, tensor) in enumerate(tensors(version.step).items()):
            save_file({name: tensor}, staged / f"shard-{number:05d}.safetensors")
        return store.commit(staged, version, run=run, fingerprint=FINGERPRINT, digests=digests)


def publish_adapter(store: WeightStore, version: Version, *, rank: int) -> tuple[Manifest, str]:
    """Commit an adapter for one layer with 4 inputs and 8 outputs."""
    (store.root / "versions").mkdir(parents=True, exist_ok=True)
    matrices = {"lora_A.weight": np.zeros((rank, 4), np.float32), "lora_B.weight": np.zeros((8, rank), np.float32)}
    with store.staging(version, needs_bytes=1 << 12) as staged:
        save_file({f"layer.{name}": matrix for name, matrix in matrices.items()}, staged / "adapter_model.safetensors")
        (staged / ADAPTER_CONFIG_NAME).write_text(json.dumps({"r": rank}))
        return store.commit(staged, version, run="test", fingerprint=FINGERPRINT, kind="lora")


def shard(store: WeightStore, version: Version) -> Path:
    """Return the first shard of `version`."""
    return min(store.directory(version).glob("*.safetensors"))


def edit_manifest(store: WeightStore, version: Version, changes: Mapping[str, object]) -> None:
    """Overwrite top-level fields of a committed manifest."""
    path = store.directory(version) / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(changes)))
