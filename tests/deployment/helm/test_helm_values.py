"""An unknown value is refused, and an invalid one with what was expected."""

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
    """Yield each object of the chart's own schema that accepts only its own keys: its path and the keys."""
    node = resolved(node)
    if node.get("additionalProperties") is False and path[:1] != ("config",):
        yield path, list(node["properties"])
        for name, child in node["properties"].items():
            yield from closed(child, (*path, name))


def nested(path: tuple[str, ...], value: Any) -> Any:
    return nested(path[:-1], {path[-1]: value}) if path else value


def test_every_object_refuses_a_key_that_it_does_not_know() -> None:
    objects = dict(closed())
    assert len(objects) > 20
    unknown: dict[str, Any] = {}
    for path in objects:
        into = unknown
        for name in path:
            into = into.setdefault(name, {})
        into["nosuchkey"] = 1
    message = refusal(unknown)
    missed = [path for path in objects if f"'/{'/'.join(path)}': additional properties 'nosuchkey'" not in message]
    assert missed == [()], "all objects are reported together"
    assert "at '': additional properties 'nosuchkey' not allowed" in message


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
        ("generator.extraEnv[0].value=x", "at '/generator/extraEnv/0': missing property 'name'"),
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
        keys = [key for key in keys if (*path, key) != ("global",)]
        assert set(values) == set(keys), path
        assert resolved(node)["required"] == keys, path


LARGE = [
    "generator.replicas",
    "generator.accelerator.count",
    "generator.startupBudgetSeconds",
    "trainer.accelerator.count",
    "trainer.backoffLimit",
    "trainer.terminationGracePeriodSeconds",
    "test.stepMinutes",
]


@pytest.mark.parametrize("key", LARGE)
def test_a_large_number_stays_an_integer(key: str) -> None:
    """helm reads numbers as floats, and would write 2e+06, which Kubernetes refuses."""
    assert "e+06" not in json.dumps(render(nested(tuple(key.split(".")), 2_000_000)))
