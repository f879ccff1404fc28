"""The chart's complete output, compared with tests/golden/helm. A review sees what a change of the chart does.

After a change: TANDEM_GOLDEN=write .venv/bin/pytest tests/deployment/helm/test_helm_golden.py
"""

from __future__ import annotations

import os
import re

import pytest
import yaml

from support.helm import CHART, ROOT, helm

pytestmark = pytest.mark.helm

GOLDEN = ROOT / "tests/golden/helm"
FILES = ("files/digits/prepare.py", "files/digits/rewards.py", "files/check.py", "files/dashboard.json")
NODES = "--set trainer.nodes=2,storage.runs.accessMode=ReadWriteMany"
SCRIPT = "project.configMap=mine,trainer.script=train.py --max_steps 3,trainer.image.tag=trl-cpu"
SETS = {
    "defaults": (),
    "gpu": ("--values", str(CHART / "ci/gpu-values.yaml")),
    "multinode": ("--values", str(CHART / "ci/multinode-values.yaml")),
    "nodes": (
        *NODES.split(),
        "--show-only",
        "templates/service-trainer.yaml",
        "--show-only",
        "templates/job-trainer.yaml",
    ),
    "environment": ("--values", str(CHART / "ci/environment-values.yaml")),
    "watch": (
        "--values",
        str(CHART / "ci/watch-values.yaml"),
        *(
            f"--show-only=templates/{name}-watch{rest}.yaml"
            for name, rest in (
                ("deployment", ""),
                ("ingress", ""),
                ("networkpolicy", ""),
                ("secret", "-token"),
                ("service", ""),
            )
        ),
    ),
    "script": (
        "--set",
        SCRIPT,
        "--show-only",
        "templates/configmap-config.yaml",
        "--show-only",
        "templates/job-trainer.yaml",
        "--show-only",
        "templates/statefulset-generator.yaml",
    ),
}


def rendered(arguments: tuple[str, ...]) -> str:
    """Render the chart, without the random token and without the content of the repository's own files."""
    made = helm("template", "run", CHART, "--namespace", "rl", *arguments)
    assert made.returncode == 0, made.stderr
    text = re.sub(r"(?m)^  token: \S{40,}$", "  token: …", made.stdout)
    for file in FILES:
        lines = [re.escape(line) for line in (CHART / file).read_text().rstrip().splitlines()]
        block = r"(?m)^( +)" + r"\n *".join(lines) + r"$"
        text = re.sub(block, rf"\1… {file} …", text)
    return text


@pytest.mark.parametrize("name", SETS)
def test_the_output_equals_the_golden_file(name: str) -> None:
    text = rendered(SETS[name])
    file = GOLDEN / f"{name}.yaml"
    if os.environ.get("TANDEM_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text(), (
        f"if {file.name} should change, write it again with TANDEM_GOLDEN=write: see {__file__}"
    )


def test_every_template_appears_in_a_golden_file_and_no_golden_file_is_unused() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == SETS.keys()
    text = "".join(file.read_text() for file in GOLDEN.iterdir())
    shown = set(re.findall(r"# Source: tandem/templates/(\S+)", text))
    templates = {str(path.relative_to(CHART / "templates")) for path in (CHART / "templates").rglob("*.yaml")}
    assert shown == templates - {"validate.yaml"}


def test_two_renderings_differ_only_in_the_token() -> None:
    first, second = rendered(()), rendered(())
    assert first == second
    assert len(list(yaml.safe_load_all(first))) > 10
    assert "token: …" in first
