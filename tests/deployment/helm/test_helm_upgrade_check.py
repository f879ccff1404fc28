"""Before an upgrade changes anything, both services read the new configuration, each in its new image."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.helm import CHART, Object, helm, is_before_upgrade, names, of_kind, one, render
from support.kube_api import KubeApi, kube_api
from support.variations import CI, OWN

pytestmark = pytest.mark.helm

MAP = {"project": {"configMap": "mine"}}
IMPOSSIBLE: list[dict[str, Any]] = [
    {"rollout": {"num_generations": 1}},
    {"rollout": {"num_prompts": 0}},
    {"optim": {"learning_rate": -1}},
    {"grpo": {"loss_type": "dapo"}, "online_dpo": {"judge": "judge:better"}},
]
"""Sections of `trainer` that the services refuse. helm's schema does not refuse all of them, if `config` is a text."""


def checks(objects: list[Object]) -> dict[str, Object]:
    """Return the Jobs of the check, by service."""
    found = [job for job in of_kind(objects, "Job") if is_before_upgrade(job)]
    return {job["metadata"]["name"].split("-")[-2]: job for job in found}


def container(job: Object) -> Object:
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return dict(only)


def check(service: str, config: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a check's own command here, with the file that its pod gets."""
    objects = render({"config": yaml.safe_dump(config), **MAP}, upgrade=True)
    path = folder / "config.yaml"
    path.write_text(one(objects, "ConfigMap", "-check")["data"]["config.yaml"])
    tini, group, dashes, python, *words = container(checks(objects)[service])["command"]
    assert [tini, group, dashes, python] == ["tini", "-g", "--", "python3"]
    words = [str(path) if word == "/config/config.yaml" else word for word in words]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False)


def with_trainer(section: dict[str, Any]) -> dict[str, Any]:
    return {**OWN["config"], "trainer": {**OWN["config"]["trainer"], **section}}


def test_both_services_accept_a_valid_configuration(tmp_path: Path) -> None:
    for service in ("generator", "trainer"):
        made = check(service, OWN["config"], tmp_path)
        assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("section", IMPOSSIBLE, ids=str)
def test_a_configuration_that_the_trainer_cannot_run_fails_the_check(section: dict[str, Any], tmp_path: Path) -> None:
    made = check("trainer", with_trainer(section), tmp_path)
    assert made.returncode == 2, made.stdout
    assert " ERROR " in made.stderr


def test_a_configuration_that_the_generator_cannot_serve_fails_the_check(tmp_path: Path) -> None:
    made = check("generator", {**OWN["config"], "generator": {"gpu_memory_utilization": 1.5}}, tmp_path)
    assert (made.returncode, "gpu_memory_utilization" in made.stderr) == (2, True), made.stderr


@pytest.mark.parametrize("values", [{}, *CI.values()], ids=["defaults", *CI])
def test_the_checks_run_in_the_services_own_images_and_wait_for_nothing(values: dict[str, Any]) -> None:
    objects = render(values, upgrade=True)
    assert set(checks(objects)) == {"generator", "trainer"}
    created_before = {("ConfigMap", one(objects, "ConfigMap", "-check")["metadata"]["name"])}
    for service, job in checks(objects).items():
        spec = job["spec"]["template"]["spec"]
        image = container(job)["image"]
        assert f"tandem-{service}" in image
        assert "serviceAccountName" not in spec, "a first sync of Argo CD has none yet"
        assert not spec["automountServiceAccountToken"]
        assert "affinity" not in spec, "the node of the generators may be full"
        mounted = {("ConfigMap", v["configMap"]["name"]) for v in spec["volumes"] if "configMap" in v}
        assert mounted == created_before
        assert not [v for v in spec["volumes"] if "persistentVolumeClaim" in v or "secret" in v]
        assert {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}} in (
            job["spec"]["podFailurePolicy"]["rules"]
        )


def test_a_check_has_another_name_if_it_checks_something_else() -> None:
    """`kubectl apply` takes it for an ordinary Job, whose template must not change."""

    def name(steps: int, **values: Any) -> str:
        objects = render({"config": {"trainer": {"max_steps": steps}}, **values}, upgrade=True)
        return str(checks(objects)["trainer"]["metadata"]["name"])

    assert name(10) == name(10, monitoring={"rules": {"enabled": True}}) != name(20)


def test_the_check_can_be_turned_off() -> None:
    with_check, without = (
        names(render({"upgradeCheck": {"enabled": enabled}}, upgrade=True)) for enabled in (True, False)
    )
    assert {kind for kind, _ in with_check - without} == {"Job", "ConfigMap"}
    assert without < with_check


def release(api: KubeApi) -> dict[tuple[str, str], Object]:
    """Return the release's objects: without those of the check, and without helm's own records."""
    return {key: thing for key, thing in api.objects.items() if key[0] != "secrets" and "-check" not in key[1]}


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with kube_api() as made:
        yield made


def test_an_upgrade_whose_check_fails_changes_nothing(api: KubeApi) -> None:
    chart = (str(CHART), "--disable-openapi-validation", "--namespace", "rl", "--kube-apiserver", api.url)
    assert helm("install", "run", *chart).returncode == 0
    assert not api.hooks, "there is nothing that a mistake could stop"
    before = release(api)
    api.hooks_fail = True
    made = helm("upgrade", "run", *chart, "--set", "config.trainer.max_steps=20")
    assert (made.returncode, "pre-upgrade hooks failed" in made.stderr) == (1, True), made.stderr
    assert release(api) == before
    assert [name for name in api.names("Job") if "check" in name], "it has the log"
    api.hooks_fail = False
    assert helm("upgrade", "run", *chart, "--set", "config.trainer.max_steps=20").returncode == 0
    assert len(api.hooks) == 3, "the first one failed; then one for each service"
    assert not [name for name in api.names("Job") if "check" in name], "helm deletes them"
