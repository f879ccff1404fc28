"""Manifests of delta versions: what they may say, and what the manifests of complete versions keep saying."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.delta_versions import Trainer
from support.weights import publish as publish_float32
from tandem_protocol.errors import StoreError
from tandem_protocol.manifest import Manifest
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(WeightStore(tmp_path / "weights"))


def test_a_complete_version_has_the_manifest_of_earlier_releases(trainer: Trainer, tmp_path: Path) -> None:
    manifest, _ = publish_float32(WeightStore(tmp_path / "plain"), Version(1, 1))
    assert b"delta" not in manifest.to_bytes()
    assert manifest.format == 1
    (full, _), (delta, _) = trainer.steps(1)
    assert (full.format, delta.format) == (1, 2)
    assert b'"delta"' not in full.to_bytes()
    assert Manifest.model_validate_json(delta.to_bytes()) == delta


@pytest.mark.parametrize("change", [{"format": 1}, {"delta": None}, {"parent": "9.1"}])
def test_a_manifest_whose_delta_makes_no_sense_is_refused(trainer: Trainer, change: dict[str, object]) -> None:
    *_, (manifest, _) = trainer.steps(1)
    content = manifest.model_dump()
    if "parent" in change:
        content["delta"] |= change
    else:
        content |= change
    with pytest.raises(ValueError, match="expected"):
        Manifest.model_validate(content)


def test_a_delta_without_a_parent_is_not_committed(trainer: Trainer) -> None:
    trainer.steps(1)
    version = Version(3, 1)
    with trainer.store.staging(version, needs_bytes=0) as staged:
        (staged / "model-00001-of-00002.safetensors.delta").write_bytes(b"x")
        assert trainer.last
        with pytest.raises(StoreError, match="expected a parent with that file"):
            trainer.store.commit(staged, version, run="test", fingerprint=trainer.last[0].fingerprint)
