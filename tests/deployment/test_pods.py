"""The chart's pods run in podman with the mock generator: end of a run, isolation, probes, upgrade, restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.blocks import blocks
from support.helm import CHART, render
from support.podman import cluster, podman
from support.pods import Pod
from support.probes import probed
from support.runs import Run, upgraded

pytestmark = [pytest.mark.docker, pytest.mark.helm, pytest.mark.podman]

START_TIMEOUT_S = 180.0
END_TIMEOUT_S = 180.0


MOCK = CHART / "ci/mock-values.yaml"
STEPS = 50
"""Of the run in MOCK."""
ENDLESS = {"config": {"trainer": {"max_steps": 1_000_000}}, "generator": {"replicas": 1}}


@pytest.fixture(scope="module")
def finished(mock_pods: None) -> Iterator[Run]:
    """The run with the mock that the chart ships, finished. It has two generators."""
    with cluster() as made:
        run = Run(made, render(of=MOCK))
        run.start(timeout_s=START_TIMEOUT_S)
        assert run.end(timeout_s=END_TIMEOUT_S) == [0], run.logs()
        yield run


@pytest.fixture(scope="module")
def endless(mock_pods: None) -> Iterator[Run]:
    """A run that trains until it is stopped and has finished its first step."""
    with cluster() as made:
        run = Run(made, render(ENDLESS, of=MOCK))
        run.start(timeout_s=START_TIMEOUT_S)
        run.reach(1)
        yield run


def test_the_rendered_pods_train_to_the_end_and_every_replica_serves_the_last_policy(finished: Run) -> None:
    assert [line["step"] for line in finished.metrics()] == list(range(1, STEPS + 1))
    assert [line["eval"]["n"] for line in finished.metrics() if line.get("eval")] == [8, 8]
    assert len(finished.generators) == 2
    for generator in finished.generators:
        assert finished.served(generator) == finished.metrics()[-1]["version"]


def test_helm_test_passes_after_a_run(finished: Run) -> None:
    finished.test(timeout_s=END_TIMEOUT_S)


def test_results_can_be_copied_with_the_pod_of_the_documentation(finished: Run) -> None:
    (manifest,) = [
        yaml.safe_load(block.text)
        for block in blocks("docs/deploy/kubernetes.md", language="yaml")
        if block.text.startswith("# results.yaml")
    ]
    manifest["metadata"]["labels"] = {"app.kubernetes.io/component": "results"}
    manifest["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = "run-tandem-runs"
    pod = Pod("results", manifest, manifest["spec"]["restartPolicy"], ())
    finished.cluster.play(finished.objects, [pod], timeout_s=START_TIMEOUT_S)
    archive = podman("exec", finished.cluster.container(pod), "sh", "-c", "tar cf - /runs/mock 2>/dev/null | tar tf -")
    copied = {Path(line).suffix for line in archive.splitlines() if f"runs/mock/checkpoints/{STEPS:06d}/model/" in line}
    assert ".safetensors" in copied
    assert finished.refusal(pod, "/runs/x") == "EROFS"


def test_a_changed_configuration_gives_a_new_job_that_resumes_from_the_checkpoint(finished: Run) -> None:
    before = [finished.started_at(generator) for generator in finished.generators]
    more = render({"config": {"trainer": {"max_steps": STEPS + 2}}}, of=MOCK)
    objects = upgraded(finished.objects, more)
    changed = Run(finished.cluster, objects)
    assert {pod.name for pod in changed.trainers}.isdisjoint(pod.name for pod in finished.trainers)
    changed.start_trainers(timeout_s=START_TIMEOUT_S)
    assert changed.end(timeout_s=END_TIMEOUT_S) == [0], changed.logs()
    assert [line["step"] for line in changed.metrics()] == list(range(1, STEPS + 3))
    assert [line["version"] for line in changed.metrics()[STEPS - 1 :]] == ["50.1", "51.2", "52.2"]
    for generator in finished.generators:
        assert finished.served(generator) == "52.2"
    assert [finished.started_at(generator) for generator in finished.generators] == before


def test_helm_test_passes_during_a_run(endless: Run) -> None:
    endless.test(timeout_s=END_TIMEOUT_S)


def test_pods_are_isolated_and_unprivileged(endless: Run) -> None:
    for pod in endless.pods:
        status = dict(
            line.split(":\t", 1)
            for line in endless.cluster.python(pod, "print(open('/proc/1/status').read())").splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split() == ["10001"] * 4
        assert status["Gid"].split() == ["10001"] * 4
        assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert endless.refusal(pod, "/opt/x") == "EROFS"
        assert endless.refusal(pod, "/tmp/x") == "none"
        assert endless.refusal(pod, "/dev/shm/x") == "none"


def test_a_generator_can_write_its_lease_but_no_weights(endless: Run) -> None:
    (generator,), (trainer,) = endless.generators, endless.trainers
    for path in ("/weights/x", "/opt/store/LATEST", "/cache/x", "/secrets/x"):
        assert endless.refusal(generator, path) == "EROFS"
    assert endless.refusal(generator, "/leases/x") == "none"
    for path in ("/weights/x", "/cache/x", "/runs/x"):
        assert endless.refusal(trainer, path) == "none"


def test_the_token_is_in_no_environment_and_the_generator_requires_it(endless: Run) -> None:
    for pod in endless.pods:
        assert endless.token not in json.dumps(endless.cluster.inspect(pod))
    (generator,) = endless.generators
    assert endless.ask(generator, "/info", token="") == 401
    assert endless.ask(generator, "/info", token=endless.token) == 200


def test_probes_pass_during_switches_of_weights(endless: Run) -> None:
    (generator,) = endless.generators
    first = endless.step(generator)
    with probed(generator, endless.cluster.address(generator)) as answers:
        endless.reach(first + 20)
    assert len(answers.ready) >= 10
    assert set(answers.ready) == set(answers.alive) == {True}


def test_a_killed_generator_restarts_and_serves_the_newest_weights(endless: Run) -> None:
    (generator,) = endless.generators
    before = endless.step(generator)
    endless.cluster.kill(generator)
    endless.reach(before + 3)
    assert endless.cluster.inspect(generator)["RestartCount"] == 1
    steps = [line["step"] for line in endless.metrics()]
    assert steps == list(range(1, len(steps) + 1))


def test_stopped_pods_end_within_their_grace_period(mock_pods: None) -> None:
    with cluster() as made:
        run = Run(made, render(ENDLESS, of=MOCK))
        run.start(timeout_s=START_TIMEOUT_S)
        run.reach(1)
        for pod in (*run.trainers, *run.generators):
            assert made.stop(pod) == (143 if pod in run.trainers else 0), made.logs(pod)
        assert run.checkpoint(len(run.metrics())).exists(), "the trainer wrote a last checkpoint"
        made.down()
        assert made.leftovers() == []
