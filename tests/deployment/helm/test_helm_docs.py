"""The pages about Kubernetes name only values, keys and files that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from support.helm import CHART, ROOT

pytestmark = pytest.mark.helm

PAGES = sorted((ROOT / "docs/deploy").glob("kubernetes*.md"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def names_a_value(words: list[str]) -> bool:
    node: Any = SCHEMA
    for word in words:
        node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        if node.get("additionalProperties"):  # any key
            return True
        if word not in node.get("properties", {}):
            return False
        node = node["properties"][word]
    return True


def names_a_key(name: str) -> bool:
    section, _, key = name.rpartition(".")
    page = (ROOT / "docs/reference/config.md").read_text().partition(f"\n## `{section}`\n")[2].partition("\n## ")[0]
    return f"\n| `{key}` |" in page


def test_the_pages_are_found() -> None:
    assert [page.name for page in PAGES] == ["kubernetes-multinode.md", "kubernetes-upgrade.md", "kubernetes.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_value_and_key_that_a_page_names_exists(page: Any) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    dotted = set(re.findall(r"`((?:\w+\.)+\w+)(?:: [^`]*)?`", text))
    ours = {name for name in dotted if name.split(".")[0] in SCHEMA["properties"]}
    assert ours
    assert [name for name in ours if not names_a_value(name.split(".")) and not names_a_key(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_or_names_exists(page: Any) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [path for path in re.findall(r"\bhelm/tandem/[\w./-]+", text) if not (ROOT / path).exists()] == []
