"""A value that does not exist is refused with the one that was meant, one of another type with what was wanted."""

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
    """Every object of the schema that takes no other keys than its own: where it is, and its keys."""
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
    said = refusal(None, "--set", value)
    assert "there is no such value; " in said
    if meant:
        assert f"did you mean {meant}" in said


def test_every_key_of_every_object_is_found_again_when_a_letter_of_it_is_missing() -> None:
    objects = dict(closed())
    assert len(objects) > 20
    for path, keys in objects.items():
        broken = {f"{key[:-2]}{key[-1]}": 1 for key in keys if len(key) > 3}
        said = refusal(nested(path, broken))
        missed = [key for key in keys if len(key) > 3 and f"mean {'.'.join((*path, key))}?" not in said]
        assert not missed, said


def test_all_unknown_values_are_told_at_once() -> None:
    said = refusal({"foo": 1, "generator": {"bar": 2}})
    assert said.count("there is no such value") == 2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("generator.replicas=two", "at '/generator/replicas': got string, want integer"),
        ("generator.replicas=0", "at '/generator/replicas': minimum: got 0, want 1"),
        ("generator.shmSize=lots", "at '/generator/shmSize': 'lots' does not match pattern"),
        ("storage.weights.accessMode=RWX", "value must be one of 'ReadWriteMany', 'ReadWriteOnce'"),
        ("offline=maybe", "at '/offline': got string, want boolean"),
        ("generator=null", "missing property 'generator'"),
        ("trainer.accelerator.resource=gpu", "at '/trainer/accelerator/resource': 'gpu' does not match pattern"),
        ("generator.env.A-B=1", "A-B"),
        ("trainer.image.tag=latest", 'trainer.image.tag: got "latest", expected one that stays what it is'),
        ("config.generator.tensor_parallel_size=2,generator.accelerator.count=2", "so leave it out"),
        ("generator.accelerator.count=4,generator.dataParallelSize=3", "expected a divisor of their number"),
        ("trainer.env.NVIDIA_VISIBLE_DEVICES=all", "the device plugin hands them out, so that no two pods share one"),
        ("generator.nodesPerReplica=2", "expected generator.accelerator.count on each"),
        (
            "project.configMap=a,project.imagePath=/b,config.shared.model=m",
            "got 2 sources of the project, expected one",
        ),
        ("project.configMap=a", "expected its config.yaml"),
        ("config=text", "config: got text that is no YAML"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_wanted(value: str, said: str) -> None:
    assert said in refusal(None, "--set", value)


def test_where_the_user_chooses_the_names_any_are_taken() -> None:
    render(
        {
            "generator": {"nodeSelector": {"a/b": "c"}, "env": {"NCCL_DEBUG": "INFO"}},
            "serviceAccount": {"annotations": {"x": "y"}},
            "global": {"somebody": "else's"},
        }
    )


def test_schema_and_values_name_the_same_keys_and_every_one_is_required() -> None:
    for path, keys in closed():
        values, node = DEFAULTS, SCHEMA
        for name in path:
            values, node = values[name], resolved(node)["properties"][name]
        assert set(values) == set(keys), path
        assert resolved(node)["required"] == keys, path
