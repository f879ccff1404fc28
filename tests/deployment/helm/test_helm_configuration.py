"""The configuration, the project and the token of a release reach both services."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

import tandem_protocol.config.generator
import tandem_protocol.config.trainer
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
        settings: dict[str, Any] = {
            "generator": tandem_protocol.config.generator.GeneratorSettings,
            "trainer": tandem_protocol.config.trainer.TrainerSettings,
            "environment": tandem_protocol.config.trainer.TrainerSettings,
        }
        if container["name"] == "watch":
            continue  # it reads no settings
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
    loaded, _ = load(tandem_protocol.config.trainer.TrainerSettings, path=tmp_path / "config.yaml", env={})
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
