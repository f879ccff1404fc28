"""Links in the documentation lead somewhere, generated pages are up to date, and every page is on the site."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from support.blocks import PAGES, ROOT

DOCS = ROOT / "docs"
SCRIPTS = sorted((DOCS / "reference").glob("make_*.py"))


def _without_code(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file and the anchor of each link within the repository. The anchor may be empty."""
    text = re.sub(r"`[^`\n]*`", "", _without_code(page))
    for address in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = address.partition("#")
        yield (page.parent / path).resolve() if path else page, anchor


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule, which docs/hooks.py sets for the site too."""
    headings = re.findall(r"^#+ (.+)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_that_exists(page: str) -> None:
    assert [str(target) for target, _ in _links(ROOT / page) if not target.exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_anchor_in_a_link_is_a_heading_of_its_page(page: str) -> None:
    links = [(target, anchor) for target, anchor in _links(ROOT / page) if anchor and target.suffix == ".md"]
    # Anchors of the Python reference come from docstrings. `mkdocs build --strict` checks those.
    wrong = [
        f"{target.relative_to(ROOT)}#{anchor}"
        for target, anchor in links
        if anchor not in _anchors(target) and not anchor.startswith("tandem_protocol.")
    ]
    assert wrong == []


def test_every_page_of_docs_is_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(_leaves(navigation)) == sorted(pages)


def _leaves(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node
    return [leaf for child in children for leaf in _leaves(child)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_generated_page_is_what_its_script_writes(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(script.parent)
    page = runpy.run_path(str(script))["page"]()
    written = script.with_name(f"{script.stem.removeprefix('make_')}.md").read_text()
    assert written == page, "the page is out of date. Fix: make docs"


def test_there_is_a_generated_page_for_each_reference() -> None:
    assert {script.stem for script in SCRIPTS} == {"make_architectures", "make_chart", "make_cli", "make_config"}


@pytest.mark.parametrize(
    ("repo_url", "shown"),
    [(None, "`services/trainer/loop.py`"), ("https://forge/us/it/", "[loop](https://forge/us/it/blob/HEAD/%s)")],
)
def test_a_link_to_a_file_outside_docs_becomes_its_path_or_its_address(repo_url: str | None, shown: str) -> None:
    path = "services/trainer/loop.py"
    outside = runpy.run_path(str(DOCS / "hooks.py"))["_outside"]
    assert outside("loop" if repo_url else "`loop.py`", path, "", repo_url) == shown.replace("%s", path)
    assert outside("the loop", path, "", None) == f"the loop (`{path}`)"


@pytest.mark.parametrize("diagram", sorted(DOCS.rglob("*.svg")), ids=lambda diagram: diagram.name)
def test_a_diagram_has_a_title_and_a_description_and_loads_nothing(diagram: Path) -> None:
    root = ElementTree.parse(diagram).getroot()
    described_by = root.attrib["aria-labelledby"].split()
    texts = {element.get("id"): element.text for element in root.iter() if element.get("id")}
    assert all(texts[name] for name in described_by)
    assert not re.search(r"(href|src|url)\W+(https?:|//)", diagram.read_text())


def test_the_source_tree_page_names_only_files_that_exist() -> None:
    (tree,) = re.findall(r"^```text\n(.*?)^```$", (DOCS / "integrate/code.md").read_text(), re.DOTALL | re.MULTILINE)
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        path = "".join([*folders, name])
        assert (ROOT / path).exists(), path
        folders.append(name)


def test_the_trainers_image_has_the_cuda_version_of_its_lock() -> None:
    lock = (ROOT / "docker/requirements/trainer-cuda.txt").read_text()
    dockerfile = (ROOT / "docker/trainer.Dockerfile").read_text()
    (version,) = re.findall(r"^ENV CUDA_VERSION=(.*)$", dockerfile, re.MULTILINE)
    assert f"\ncuda-toolkit=={version}." in lock


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
