"""Write the files that the chart shares with others: the demo, the schema of `config`, the alerts (`make docs`).

They are copies, because helm prints a line for each link at every command.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from tandem_protocol.config.project import ProjectSettings

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm/tandem"
DEMO = ("config.yaml", "prepare.py", "rewards.py")
SECTIONS: dict[str, Any] = {name: field.annotation for name, field in ProjectSettings.model_fields.items()}
DROPPED = {"title", "description", "default", "format"}
"""Keywords that check nothing."""
TEXTS = {"integer": r"^[+-]?[0-9]+$", "number": r"^[+-]?[0-9.]+([eE][+-]?[0-9]+)?$", "boolean": "^[A-Za-z]+$"}
"""The services also read these types from text in quotes."""
ALERTS = ROOT / "docker/metrics/alerts.yaml"
PREFIX = "config."
WIDTH = 120


def main() -> None:
    for name in DEMO:
        shutil.copyfile(ROOT / "examples/digits" / name, CHART / "files/digits" / name)
    properties, definitions = config_schema()
    config = {"properties": properties, "additionalProperties": False}
    (CHART / "files/config.schema.json").write_text(dumps({**config, "$defs": definitions}) + "\n")
    ALERTS.write_text(compose_alerts())
    path = CHART / "values.schema.json"
    values = json.loads(path.read_text())
    # The demo's own configuration completes `config`. templates/_validate.tpl finds what is missing after that.
    partial = {
        name: {key: value for key, value in node.items() if key != "required"} for name, node in properties.items()
    }
    values["properties"]["config"] = {"type": ["object", "string"], **config, "properties": partial}
    own = {name: node for name, node in values["$defs"].items() if not name.startswith(PREFIX)}
    values["$defs"] = {**own, **definitions}
    path.write_text(dumps(values) + "\n")


def compose_alerts() -> str:
    """Return the rules for the Prometheus of compose.yaml: the chart's alerts with the default limits.

    The labels are those that docker/metrics/prometheus.yaml sets. Alerts about Kubernetes alone are left out: nothing
    there has their metrics.
    """
    limits = yaml.safe_load((CHART / "values.yaml").read_text())["monitoring"]["rules"]
    labels = 'namespace="compose",pod=~"tandem-{}-.*"'
    words = {
        **{name: limits[name] for name in ("noStepMinutes", "notReadyMinutes", "klSamplerMax")},
        "trainer": labels.format("trainer"),
        "generator": labels.format("generator"),
        "job": 'namespace="compose"',
        # When a run is over, both services have stopped, and Prometheus keeps the addresses that it last knew.
        "unlessOver": f" unless on (namespace) up{{{labels.format('trainer')}}} == 0",
    }
    text = (CHART / "files/alerts.yaml").read_text()
    alerts = re.split(r"(?m)^(?=- alert:)", text)[1:]
    kept = "".join(alert for alert in alerts if "tandem_" in alert)
    filled = re.sub(r"@(\w+)@", lambda found: str(words[found[1]]), kept)
    rules = "".join(f"      {line}\n" for line in filled.splitlines())
    origin = "# helm/make_files.py writes this file from helm/tandem/files/alerts.yaml."
    return f"{origin}\ngroups:\n  - name: tandem\n    rules:\n{rules}"


def config_schema() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schemas of the sections of config.yaml, and the definitions that they refer to."""
    definitions: dict[str, Any] = {}
    sections = {}
    for name, model in SECTIONS.items():
        schema = _simplified(model.model_json_schema())
        definitions |= {f"{PREFIX}{key}": node for key, node in schema.pop("$defs", {}).items()}
        sections[name] = schema | {"type": ["object", "null"]}
    return sections, definitions


def _simplified(node: Any, *, is_names: bool = False) -> Any:
    """Reduce a schema to what it checks. `is_names`: the keys of `node` are names, not keywords."""
    if isinstance(node, list):
        return [_simplified(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {
        key: _simplified(value, is_names=key in ("properties", "$defs"))
        for key, value in node.items()
        if is_names or key not in DROPPED
    }
    if is_names:
        return made
    if "$ref" in made:
        return {"$ref": made["$ref"].replace("#/$defs/", f"#/$defs/{PREFIX}")}
    if (text := TEXTS.get(made.get("type", ""))) and "enum" not in made:
        made |= {"type": [made["type"], "string"], "pattern": text}
    if "properties" in made:
        made["type"] = ["object", "null"]  # an empty section has its defaults
    return _without_null(made)


def _without_null(node: dict[str, Any]) -> dict[str, Any]:
    """Write `X or null` as X with one type more: helm's messages about `anyOf` are long."""
    options = node.get("anyOf", [])
    if len(options) != 2 or options[1] != {"type": "null"} or "type" not in options[0]:
        return node
    types = options[0]["type"]
    return {**options[0], "type": [*([types] if isinstance(types, str) else types), "null"]}


def dumps(node: Any, indent: int = 0, before: int = 0) -> str:
    """Format JSON: on one line what fits on one. `before`: characters that the first line already has."""
    line = json.dumps(node)
    if indent + before + len(line) < WIDTH or not isinstance(node, dict | list) or not node:
        return line
    inner = indent + 2
    if isinstance(node, list):
        items = [dumps(item, inner) for item in node]
    else:
        items = [f"{json.dumps(key)}: {dumps(value, inner, len(key) + 4)}" for key, value in node.items()]
    opening, closing = "[]" if isinstance(node, list) else "{}"
    return "\n".join([opening, ",\n".join(f"{' ' * inner}{item}" for item in items), f"{' ' * indent}{closing}"])


if __name__ == "__main__":
    main()
