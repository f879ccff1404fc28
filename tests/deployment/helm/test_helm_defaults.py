"""`helm install` without values runs the complete CPU demo. `helm uninstall` keeps the runs."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import yaml

from support.helm import CHART, CI_VALUES, ROOT, helm, names, of_kind, one, render

pytestmark = pytest.mark.helm


def test_the_defaults_run_the_digits_example() -> None:
    objects = render()
    config = yaml.safe_load(one(objects, "ConfigMap", "-config")["data"]["config.yaml"])
    assert config == yaml.safe_load((ROOT / "examples/digits/config.yaml").read_text())
    files = one(objects, "ConfigMap", "-project")["data"]
    assert files == {name: (ROOT / "examples/digits" / name).read_text() for name in ("prepare.py", "rewards.py")}


def test_the_defaults_render_these_kinds_of_objects() -> None:
    assert sorted(kind for kind, _ in names(render())) == sorted(
        ["StatefulSet", "Job", "Service", "PodDisruptionBudget", "ServiceAccount", "Secret", "Pod"]
        + ["ConfigMap"] * 2 + ["PersistentVolumeClaim"] * 3 + ["NetworkPolicy"] * 4
    )  # fmt: skip


@pytest.mark.parametrize("file", [None, *CI_VALUES], ids=lambda file: file.name if file else "defaults")
def test_helm_lint_passes(file: object) -> None:
    made = helm("lint", "--strict", CHART, *(["--values", str(file)] if file else []))
    assert made.returncode == 0, made.stdout + made.stderr


def test_uninstalling_keeps_the_runs_and_the_notes_say_so() -> None:
    kept = {
        thing["metadata"]["name"]
        for thing in render()
        if thing["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    assert kept == {"run-tandem-runs"}
    assert "removes everything except the claim run-tandem-runs" in notes()
    own = notes("--set", "storage.runs.existingClaim=mine")
    assert "removes everything except your own claims" in own
    assert "delete pvc" not in own


def test_the_notes_use_the_names_of_the_rendered_objects() -> None:
    text = notes()
    job = one(render(), "Job")["metadata"]["name"]
    assert f"job/{job}" in text
    assert "/runs/digits/metrics.jsonl" in text
    assert "run-tandem-weights needs a storage class that supports ReadWriteMany" in text
    one_node = notes("--values", str(CHART / "ci/cpu-values.yaml"))
    assert "ReadWriteMany" not in one_node
    assert "all pods must run on one node" in one_node
    assert "4 × nvidia.com/gpu for the generators, 4 × nvidia.com/gpu for the trainer" in notes(
        "--values", str(CHART / "ci/gpu-values.yaml")
    )


def test_a_package_contains_the_demo_and_renders_the_same(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "helm/tandem", symlinks=True)
    made = helm("package", tmp_path / "helm/tandem", "--destination", tmp_path)
    assert made.returncode == 0, made.stderr
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as archive:
        names = {name.removeprefix("tandem/files/") for name in archive.getnames() if "/files/" in name}
    demo = {f"digits/{name}" for name in ("config.yaml", "prepare.py", "rewards.py")}
    assert names == {*demo, "alerts.yaml", "check.py", "dashboard.json", "config.schema.json"}

    own = {"token": {"existingSecret": "mine"}}
    shown = helm("template", "run", package, "--namespace", "rl", "--set", "token.existingSecret=mine")
    assert [thing for thing in yaml.safe_load_all(shown.stdout) if thing] == render(own, upgrade=True)


def notes(*arguments: str) -> str:
    made = helm("install", "run", CHART, "--namespace", "rl", "--dry-run=client", *arguments)
    assert made.returncode == 0, made.stderr
    return made.stdout.partition("NOTES:")[2]


def test_every_object_is_named_after_the_release_and_has_its_own_template_file() -> None:
    files = [path for path in (CHART / "templates").rglob("*.yaml") if path.name != "validate.yaml"]
    assert all(path.read_text().count("\nkind: ") + path.read_text().count('"tandem.claim"') == 1 for path in files)
    assert all(thing["metadata"]["name"].startswith("run-tandem") for thing in render())
    assert not of_kind(render(), "List")
