"""An unknown value is refused with a suggestion, and an invalid one with what was expected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from support.helm import CHART, refusal, render

pytestmark = pytest.mark.helm

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def closed(node: dict[str, Any] = SCHEMA, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield each object of the schema that accepts only its own keys: its path and the keys."""
    node = resolved(node)
    if "properties" in node and "additionalProperties" not in node:
        yield path, list(node["properties"])
        for name, child in node["properties"].items():
            yield from closed(child, (*path, name))


def nested(path: tuple[str, ...], value: Any) -> Any:
    return nested(path[:-1], {path[-1]: value}) if path else value


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("replicas=2", "generator.replicas"),
        ("generator.replica=2", "generator.replicas"),
        ("generator.acelerator.count=2", "generator.accelerator"),
        ("generator.gpus=2", None),
        ("trainer.node=2", "trainer.nodes"),
        ("trainer.terminationGracePeriod=2", "trainer.terminationGracePeriodSeconds"),
        ("storage.checkpoints.size=2Gi", None),
        ("storage.weight.size=2Gi", "storage.weights"),
        ("storage.runs.storageClass=x", "storage.runs.storageClassName"),
        ("storageClassName=x", "storage."),
        ("hugginface.existingSecret=x", "huggingFace"),
        ("monitoring.rules.enable=true", "monitoring.rules.enabled"),
        ("nosuchthing=1", None),
    ],
)
def test_an_unknown_value_is_refused_with_the_nearest_name(value: str, meant: str | None) -> None:
    message = refusal(None, "--set", value)
    assert "unknown value; " in message
    if meant:
        assert f"did you mean {meant}" in message


def test_every_key_is_suggested_when_one_of_its_letters_is_missing() -> None:
    objects = dict(closed())
    assert len(objects) > 20
    for path, keys in objects.items():
        broken = {f"{key[:-2]}{key[-1]}": 1 for key in keys if len(key) > 3}
        message = refusal(nested(path, broken))
        missed = [key for key in keys if len(key) > 3 and f"mean {'.'.join((*path, key))}?" not in message]
        assert not missed, message


def test_all_unknown_values_are_reported_together() -> None:
    message = refusal({"foo": 1, "generator": {"bar": 2}})
    assert message.count("unknown value") == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("generator.replicas=two", "at '/generator/replicas': got string, want integer"),
        ("generator.replicas=0", "at '/generator/replicas': minimum: got 0, want 1"),
        ("generator.shmSize=lots", "at '/generator/shmSize': 'lots' does not match pattern"),
        ("storage.weights.accessMode=RWX", "value must be one of 'ReadWriteMany', 'ReadWriteOnce'"),
        ("offline=maybe", "at '/offline': got string, want boolean"),
        ("generator=null", "missing property 'generator'"),
        ("trainer.accelerator.resource=gpu", "at '/trainer/accelerator/resource': 'gpu' does not match pattern"),
        ("generator.env.A-B=1", "A-B"),
        ("trainer.image.tag=latest", 'trainer.image.tag: got "latest", expected a fixed version'),
        ("config.generator.tensor_parallel_size=2,generator.accelerator.count=2", "got 2, expected no value"),
        ("generator.accelerator.count=4,generator.dataParallelSize=3", "expected a divisor of 4"),
        (
            "generator.accelerator.count=8,generator.dataParallelSize=2,config.generator.vllm.pipeline_parallel_size=3",
            "got 2 with pipeline_parallel_size 3 for the 8 devices of a replica, expected dataParallelSize × "
            "pipeline_parallel_size to divide 8",
        ),
        (
            "trainer.env.NVIDIA_VISIBLE_DEVICES=all",
            "expected them from the device plugin, which gives each device to one pod",
        ),
        ("generator.nodesPerReplica=2", "with generator.accelerator.count 0, expected devices on each"),
        (
            "project.configMap=a,project.imagePath=/b,config.shared.model=m",
            "got 2 sources of the project, expected 1",
        ),
        ("project.configMap=a", "expected the project's config.yaml"),
        ("config=text", "config: got invalid YAML"),
    ],
)
def test_an_invalid_value_is_refused_with_what_was_expected(value: str, message: str) -> None:
    assert message in refusal(None, "--set", value)


def test_maps_with_user_defined_keys_accept_any_key() -> None:
    render(
        {
            "generator": {"nodeSelector": {"a/b": "c"}, "env": {"NCCL_DEBUG": "INFO"}},
            "serviceAccount": {"annotations": {"x": "y"}},
            "global": {"somebody": "else's"},
        }
    )


def test_schema_and_values_have_the_same_keys_and_all_are_required() -> None:
    for path, keys in closed():
        values, node = DEFAULTS, SCHEMA
        for name in path:
            values, node = values[name], resolved(node)["properties"][name]
        assert set(values) == set(keys), path
        assert resolved(node)["required"] == keys, path
