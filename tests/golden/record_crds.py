"""Record `crds.json`: the published schemas of the objects of JobSet, LeaderWorkerSet and Kueue that we use.

Descriptions are left out, and so are the templates of Jobs and pods: kubernetes-validate checks those. To run it, with
clones of the three repositories of kubernetes-sigs in DIR:

    .venv/bin/python tests/golden/record_crds.py DIR/jobset DIR/lws DIR/kueue
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("crds.json")
BASES = {
    "jobset": ("config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml",),
    "lws": ("config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml",),
    "kueue": tuple(
        f"config/components/crd/bases/kueue.x-k8s.io_{name}.yaml"
        for name in ("clusterqueues", "localqueues", "resourceflavors")
    ),
}
TEMPLATES = ("template", "leaderTemplate", "workerTemplate", "volumeClaimTemplates", "status")
KEYWORDS = {"type", "properties", "items", "required", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems"}


def main() -> None:
    recorded = {}
    for clone in map(Path, sys.argv[1:]):
        name = next(name for name in BASES if name in str(clone))
        commit = _git(clone, "rev-parse", "HEAD").strip()
        for base in BASES[name]:
            crd = yaml.safe_load(_git(clone, "show", f"HEAD:{base}"))["spec"]
            for version in crd["versions"]:
                key = f"{crd['group']}/{version['name']} {crd['names']['kind']}"
                schema = _reduced(version["schema"]["openAPIV3Schema"])
                recorded[key] = {"source": f"kubernetes-sigs/{name} {commit[:12]}", **schema}
    lines = [f"{json.dumps(key)}: {json.dumps(schema, sort_keys=True)}" for key, schema in sorted(recorded.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _git(clone: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", clone, *words], capture_output=True, text=True, check=True).stdout


def _reduced(node: dict[str, Any]) -> dict[str, Any]:
    """Keep what checks an object. An object accepts only the properties that its schema names."""
    made = {key: value for key, value in node.items() if key in KEYWORDS}
    if isinstance(node.get("additionalProperties"), dict):
        made["additionalProperties"] = _reduced(node["additionalProperties"])
    if node.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if "items" in made:
        made["items"] = _reduced(made["items"])
    if properties := node.get("properties"):
        made["properties"] = {name: {} if name in TEMPLATES else _reduced(child) for name, child in properties.items()}
        made["additionalProperties"] = False
    return made


if __name__ == "__main__":
    main()
