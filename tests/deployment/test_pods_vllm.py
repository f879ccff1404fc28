"""The chart's pods run in podman, with vLLM on the CPU."""

from __future__ import annotations

import pytest
import yaml

from support.helm import CHART, ROOT, render
from support.podman import cluster
from support.probes import probed
from support.runs import Run, project_values

pytestmark = [
    pytest.mark.docker,
    pytest.mark.helm,
    pytest.mark.podman,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
]

STEPS = 3


def test_vllm_and_trainer_train_to_the_end_while_probes_pass(cpu_pods: None) -> None:
    values = project_values(STEPS)
    digits = yaml.safe_load((ROOT / "examples/digits/config.yaml").read_text())
    values["config"]["generator"] = digits["generator"]
    with cluster() as made:
        run = Run(made, render(values, of=CHART / "ci/cpu-values.yaml"))
        run.start(timeout_s=600)
        (generator,) = run.generators
        with probed(generator, made.address(generator)) as answers:
            assert run.end(timeout_s=600) == [0], run.logs()
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        assert run.served(generator) == run.metrics()[-1]["version"]
        assert set(answers.ready) == set(answers.alive) == {True}
