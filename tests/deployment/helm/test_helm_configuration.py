"""The configuration, the project and the token of a release reach both services."""

from __future__ import annotations

import base64
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tandem_generator.config
import tandem_trainer.config
from support.helm import ROOT, Object, names, of_kind, one, pod_templates, render
from support.variations import CI, OWN, PROJECTS
from tandem_protocol.config import load

pytestmark = pytest.mark.helm


def config_text(objects: list[Object]) -> str:
    text = one(objects, "ConfigMap", "-config")["data"]["config.yaml"]
    assert isinstance(text, str)
    return text


def prepare(values: dict[str, Any]) -> tuple[Object, Object]:
    """Return the container that prepares the project, and the volumes of its pod by name."""
    spec = one(render(values), "Job")["spec"]["template"]["spec"]
    (container,) = spec["initContainers"]
    return container, {volume["name"]: volume for volume in spec["volumes"]}


@pytest.mark.parametrize("values", CI.values(), ids=list(CI))
def test_both_services_accept_the_configuration_and_the_variables_of_the_chart(
    values: dict[str, Any], tmp_path: Path
) -> None:
    objects = render(values)
    (tmp_path / "config.yaml").write_text(config_text(objects))
    for template in (pod for thing in objects if thing["kind"] != "Pod" for pod in pod_templates(thing)):
        (container,) = template["spec"]["containers"]
        env = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        settings = {"generator": tandem_generator.config.Settings, "trainer": tandem_trainer.config.Settings}
        load(settings[container["name"]], path=tmp_path / "config.yaml", env=env)


def test_a_single_key_of_the_demos_configuration_can_be_changed() -> None:
    config = yaml.safe_load(config_text(render({"config": {"trainer": {"max_steps": 3}}})))
    assert config["trainer"]["max_steps"] == 3
    assert config["trainer"]["rewards"] == [{"function": "rewards:exact_match"}]


def test_the_configuration_of_a_project_is_used_unchanged() -> None:
    for values in (OWN, {"config": yaml.safe_dump(OWN["config"])}):
        objects = render({**values, "project": {"configMap": "mine"}})
        assert yaml.safe_load(config_text(objects)) == OWN["config"]


def test_large_and_small_numbers_reach_the_trainer_unchanged(tmp_path: Path) -> None:
    trainer = {
        "max_steps": 1_000_000,
        "seed": 2**32 - 1,
        "optim": {"learning_rate": 1e-07, "weight_decay": 0.1, "adam_epsilon": 1e-12},
    }
    (tmp_path / "config.yaml").write_text(config_text(render({"config": {"trainer": trainer}})))
    loaded, _ = load(tandem_trainer.config.Settings, path=tmp_path / "config.yaml", env={})
    got = loaded.trainer
    assert (got.max_steps, got.seed) == (1_000_000, 2**32 - 1)
    assert (got.optim.learning_rate, got.optim.adam_epsilon) == (1e-07, 1e-12)


@pytest.mark.parametrize(
    ("source", "volume", "sources"),
    [
        ("demo", {"configMap": {"name": "run-tandem-project"}}, "/source:/config"),
        ("files", {"configMap": {"name": "run-tandem-project"}}, "/source:/config"),
        ("map", {"configMap": {"name": "mine"}}, "/source:/config"),
        ("claim", {"persistentVolumeClaim": {"claimName": "mine", "readOnly": True}}, "/source:/config"),
        ("image", None, "/opt/mine:/config"),
    ],
)
def test_each_source_of_a_project_is_mounted_and_the_configuration_overrides_its_config_yaml(
    source: str, volume: Object | None, sources: str
) -> None:
    container, volumes = prepare(PROJECTS[source])
    assert volumes.get("project") == (volume and {"name": "project", **volume})
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/config"] == {"name": "config", "mountPath": "/config", "readOnly": True}
    assert ("/source" in mounts) == (volume is not None)
    assert {"name": "TANDEM_PROJECT_SOURCES", "value": sources} in container["env"]
    made = ("ConfigMap", "run-tandem-project") in names(render(PROJECTS[source]))
    assert made == (source in ("demo", "files"))


def test_generators_wait_for_the_marker_that_the_trainers_pod_writes() -> None:
    objects = render()
    init_containers = {
        pod["spec"]["initContainers"][0]["name"]: pod["spec"]["initContainers"][0]
        for thing in objects
        if thing["kind"] != "Pod"
        for pod in pod_templates(thing)
    }
    assert init_containers.keys() == {"project", "prepare"}
    waiting, preparing = (
        {entry["name"]: entry.get("value") for entry in init_containers[name]["env"]} for name in ("project", "prepare")
    )
    for name in ("TANDEM_PREPARED", "TANDEM_PROJECT_DIR"):
        assert waiting[name] == preparing[name]


def test_the_init_containers_prepare_the_project_and_wait_for_it(tmp_path: Path) -> None:
    """The commands of both containers run here, with other paths. Waiting fails until the project is prepared."""
    for folder in ("weights", "cache", "source", "config"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config/config.yaml").write_text("shared: {model: .}\n")
    (tmp_path / "source/rewards.py").write_text("x = 1\n")
    (tmp_path / "source/config.yaml").write_text("from: the project\n")
    objects = render({"generator": {"startupBudgetSeconds": 10}})
    replica, job = one(objects, "StatefulSet"), one(objects, "Job")
    wait, make = (thing["spec"]["template"]["spec"]["initContainers"][0] for thing in (replica, job))

    missing = run(wait, tmp_path)
    assert missing.returncode == 1
    assert "the project was not ready within 10 s" in missing.stderr
    assert (tmp_path / "weights/served").is_dir()
    assert run(make, tmp_path).returncode == 0
    project = tmp_path / "cache/project"
    assert (project / "rewards.py").read_text() == "x = 1\n"
    assert (project / "config.yaml").read_text() == "shared: {model: .}\n", "the chart's configuration wins"
    assert run(wait, tmp_path).returncode == 0
    (project / ".prepared").write_text("another configuration")
    assert run(wait, tmp_path).returncode == 1


def test_the_first_of_several_trainer_pods_prepares_the_project_and_the_others_wait(tmp_path: Path) -> None:
    for folder in ("weights", "cache", "source", "config"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config/config.yaml").write_text("shared: {model: .}\n")
    values = {"trainer": {"nodes": 2}, "storage": {"runs": {"accessMode": "ReadWriteMany"}}}
    job = one(render({**values, "generator": {"startupBudgetSeconds": 10}}), "Job")
    (container,) = job["spec"]["template"]["spec"]["initContainers"]
    assert "was not ready within 10 s" in run(container, tmp_path, JOB_COMPLETION_INDEX="1").stderr
    assert run(container, tmp_path, JOB_COMPLETION_INDEX="0").returncode == 0
    with (tmp_path / "weights/WRITER").open() as held:  # as the running trainer in the first pod does
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(container, tmp_path, JOB_COMPLETION_INDEX="1").returncode == 0


def test_a_project_is_not_prepared_while_a_trainer_runs(tmp_path: Path) -> None:
    for folder in ("weights", "cache", "source", "config"):
        (tmp_path / folder).mkdir()
    (container,) = one(render(), "Job")["spec"]["template"]["spec"]["initContainers"]
    command = [*container["command"][:-1], re.sub(r"--timeout \d+", "--timeout 1", container["command"][-1])]
    with (tmp_path / "weights/WRITER").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ended = run({**container, "command": command}, tmp_path)
    assert ended.returncode == 1
    assert "timeout while waiting to get lock" in ended.stderr
    assert not (tmp_path / "cache/project").exists()


def run(container: Object, root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a container's command on this machine, with its mount points below `root`."""

    def here(text: str) -> str:
        for path in ("/weights", "/cache", "/source", "/config"):
            text = text.replace(f" {path}", f" {root}{path}").replace(f":{path}", f":{root}{path}")
            text = f"{root}{text}" if text.startswith(path) else text
        text = re.sub(r"seq \d+", "seq 1", text)
        return text.replace("python3 /opt/preflight.py", f"{sys.executable} {ROOT / 'docker/preflight.py'}")

    made = {entry["name"]: here(entry["value"]) for entry in container["env"]}
    command = [here(word) for word in container["command"]]
    return subprocess.run(command, env={**os.environ, **made, **env}, capture_output=True, text=True, timeout=120)


def test_only_the_trainers_pod_gets_the_hub_token_and_may_go_online() -> None:
    values = {"offline": False, "huggingFace": {"existingSecret": "hub", "key": "t"}}
    spec = one(render(values), "Job")["spec"]["template"]["spec"]
    for container in (*spec["initContainers"], *spec["containers"]):
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "t"}}
        assert "HF_HUB_OFFLINE" not in env
    (generator,) = one(render(values), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in generator["env"]
    assert "HF_TOKEN" not in str(generator)


def test_the_token_is_generated_into_a_secret_and_appears_in_no_other_object() -> None:
    objects = render()
    token = base64.b64decode(one(objects, "Secret")["data"]["token"]).decode()
    assert len(token) >= 32
    for thing in objects:
        if thing["kind"] != "Secret":
            assert token not in yaml.safe_dump(thing)
    text = (ROOT / "helm/tandem/templates/secret-token.yaml").read_text()
    assert 'lookup "v1" "Secret"' in text, "only a real cluster could run the lookup of the existing token"


def test_an_existing_token_secret_is_mounted_and_none_is_created() -> None:
    objects = render({"token": {"existingSecret": "mine", "key": "bearer"}})
    assert not of_kind(objects, "Secret")
    for thing in objects:
        for pod in pod_templates(thing):
            (secret,) = [volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume]
            assert (secret["secretName"], secret["items"]) == ("mine", [{"key": "bearer", "path": "token"}])
