"""`trainer.script` of the chart: a TRL script runs in the trainer's pod, in podman, with the mock generator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from support import models, podman, trl
from support.helm import CHART, Object, render
from support.podman import cluster
from support.runs import Run
from support.stack import Stack

pytestmark = [pytest.mark.docker, pytest.mark.helm, pytest.mark.podman]

TIMEOUT_S = 240.0
PREPARE = f"{Path(models.__file__).read_text()}\n\nmake_tiny_model(Path('model'))\n"


@pytest.fixture(scope="module")
def script_pods() -> None:
    """Load the images of pods with the mock generator and a trainer with TRL into podman."""
    Stack(variables={"TANDEM_SCRIPT": "train.py"}).must("build", timeout_s=1800)
    podman.sweep()
    podman.load_images("tandem-generator:mock", "tandem-trainer:trl-cpu")


def rendered() -> list[Object]:
    values = yaml.safe_load((CHART / "ci/mock-values.yaml").read_text())  # the sizes are those of this file
    values["config"] = {"generator": {"engine": "mock"}}  # the script names the model
    values["project"]["files"] = {"train.py": trl.SCRIPT.read_text(), "prepare.py": PREPARE}
    values["trainer"] |= {"script": "train.py --model model --out out", "image": {"tag": "trl-cpu"}}
    values["generator"]["replicas"] = 1
    return render(values)


def test_the_script_trains_in_its_pod_and_the_generator_serves_its_last_step(script_pods: None) -> None:
    with cluster() as made:
        run = Run(made, rendered())
        run.start(timeout_s=TIMEOUT_S)
        assert run.end(timeout_s=TIMEOUT_S) == [0], run.logs()
        (generator,) = run.generators
        assert run.served(generator) == "3.1"
        folder = made.folder("run-tandem-runs", "train")
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3]
        assert (folder / "out/grpo/model.safetensors").exists()
