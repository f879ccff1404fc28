"""Write chart.md from the chart's values.yaml (`make docs`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from tables import code, plain, table

VALUES = Path(__file__).parents[2] / "helm/tandem/values.yaml"

HEAD = """\
# Chart values

Written by `docs/reference/make_chart.py` from `helm/tandem/values.yaml` and its comments. To change a text, edit it
there.

Set a value with `--set generator.replicas=2`, or in a file of your own with `--values`. An unknown key is an error.
`helm/tandem/ci` has complete sets of values to start from. [Kubernetes](../deploy/kubernetes.md) explains how the
values work together.
"""
COLUMNS = ["key", "default", "description"]
_SECTION = re.compile(r"# -+ (.+?) -+$")


def page() -> str:
    text = VALUES.read_text()
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    lines = text.splitlines()
    rows: dict[str, list[list[str]]] = {}
    for key, default, number in _keys(text, root):
        description = plain(_comment(lines, number))
        if default or description:
            rows.setdefault(_section(lines, number), []).append([code(key), code(default), description])
    return HEAD + "".join(f"\n## {name}\n{table(COLUMNS, of_section)}" for name, of_section in rows.items())


def _section(lines: list[str], number: int) -> str:
    """The title of the section that a line is in."""
    return next(match[1] for line in reversed(lines[:number]) if (match := _SECTION.match(line)))


def _keys(text: str, node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, str, int]]:
    """Yield each key with dots, its default as YAML, and its line. Mappings have no default."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        number = key.start_mark.line
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield name, "", number
            yield from _keys(text, value, f"{name}.")
        else:
            yield name, text[value.start_mark.index : value.end_mark.index], number


def _comment(lines: list[str], number: int) -> str:
    """The comment that ends on the line above."""
    start = number
    while start and lines[start - 1].lstrip().startswith("#") and not _SECTION.match(lines[start - 1]):
        start -= 1
    return " ".join(line.strip().removeprefix("#").strip() for line in lines[start:number])


if __name__ == "__main__":
    Path(__file__).with_name("chart.md").write_text(page())
