"""`trainer.script`: the trainer runs a TRL script of the project."""

from __future__ import annotations

from typing import Any

import pytest

from support.helm import one, refusal, render

pytestmark = pytest.mark.helm

SCRIPT: dict[str, Any] = {
    "project": {"configMap": "mine"},
    "trainer": {"script": "train.py --max_steps 3", "image": {"tag": "trl-cpu"}},
}
"""Values of a script without a tandem.yaml."""


def with_config(config: Any) -> dict[str, Any]:
    return {**SCRIPT, "config": config}


def containers(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = one(render(values), "Job")["spec"]["template"]["spec"]
    return {c["name"]: c for c in (*spec["initContainers"], *spec["containers"])}


def env(container: dict[str, Any]) -> dict[str, str]:
    return {e["name"]: e.get("value", "") for e in container["env"]}


def test_the_script_is_prepared_run_and_resumed() -> None:
    found = containers(SCRIPT)
    assert env(found["prepare"])["TANDEM_SCRIPT"] == env(found["trainer"])["TANDEM_SCRIPT"] == "train.py --max_steps 3"
    assert env(found["trainer"])["TANDEM_SCRIPT_FOLDER"] == env(found["prepare"])["TANDEM_PROJECT_DIR"]
    assert found["trainer"]["args"][-1] == "--resume"


def test_both_services_read_the_settings_that_the_preparation_writes() -> None:
    trainer = containers(SCRIPT)["trainer"]["args"]
    (generator,) = one(render(SCRIPT), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert trainer[1] == generator["args"][1]
    assert trainer[1].endswith("/.tandem-config.yaml")


def test_config_is_the_scripts_tandem_yaml_and_an_empty_one_hides_none_of_the_projects() -> None:
    assert "data" not in one(render(SCRIPT), "ConfigMap", "-config")
    data = one(render(with_config({"generator": {"max_model_len": 64}})), "ConfigMap", "-config")["data"]
    assert data == {"tandem.yaml": "generator:\n  max_model_len: 64\n"}


def test_keys_of_config_are_checked_although_none_is_required() -> None:
    assert "additional properties 'dtypo' not allowed" in refusal(with_config({"generator": {"dtypo": 1}}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"trainer": SCRIPT["trainer"]}, "trainer.script: got train.py --max_steps 3 without the project that has it"),
        ({**SCRIPT, "trainer": {"script": "train.py"}}, "expected an image that has TRL. Fix: set it to trl-cpu"),
    ],
    ids=["project", "image"],
)
def test_a_script_needs_a_project_and_an_image_with_trl(values: dict[str, Any], expected: str) -> None:
    assert expected in refusal(values)


def test_another_script_restarts_the_generators_because_its_model_may_be_another() -> None:
    other = {**SCRIPT, "trainer": {**SCRIPT["trainer"], "script": "train.py --model b"}}
    first, second = (
        one(render(values), "StatefulSet")["spec"]["template"]["metadata"]["labels"]["tandem/generator-config"]
        for values in (SCRIPT, other)
    )
    assert first != second
