"""A run that publishes deltas has the same versions as one that publishes complete files, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

from support.projects import Project
from support.thorough import THOROUGH
from tandem_protocol.manifest import Manifest
from tandem_protocol.store import WeightStore

STEPS = 200 if THOROUGH else 25


def test_versions_are_the_same_with_and_without_deltas(make_project: Callable[..., Project]) -> None:
    """The mock makes the complete files of each version, and refuses the deltas if a digest differs."""
    versions: dict[str, dict[int, Manifest]] = {}
    for mode in ("never", "always"):
        project = make_project(
            mode, max_steps=STEPS, optim={"learning_rate": 5e-6}, learner={"dtype": "bfloat16"},
            publish={"delta": mode, "keep": STEPS + 1}, checkpoint={"every_steps": STEPS},
        )  # fmt: skip
        ended = project.train()
        assert ended.returncode == 0, ended.stderr
        assert "in full" not in ended.stderr, "no delta was refused"
        store = WeightStore(project.directory.parent / "weights")
        versions[mode] = {version.step: store.read(version)[0] for version in store.versions()}
    assert versions["never"].keys() == versions["always"].keys() == {*range(STEPS + 1)}
    deltas = [manifest for manifest in versions["always"].values() if manifest.delta]
    assert len(deltas) == STEPS
    assert not any(manifest.delta for manifest in versions["never"].values())
    for step, complete in versions["never"].items():
        assert versions["always"][step].files == complete.files, f"the digests of step {step}"
    digests = {file.xxh3_128 for manifest in deltas for file in manifest.files}
    assert len(digests) == STEPS * len(deltas[0].files), "each step has changed the weights"
