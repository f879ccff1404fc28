"""The contract's pages show the answers that requests really get, and name all routes and errors."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from support.blocks import ROOT, blocks
from tandem_generator.engines.mock import MockEngine
from tandem_generator.server import build_app
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol import routes
from tandem_protocol.config.generator import GeneratorConfig, MockConfig
from tandem_protocol.errors import TandemError, _tree
from tandem_protocol.manifest import Changes, Manifest
from tandem_protocol.messages import Info
from tandem_protocol.store import Lease, WeightStore

CONTRACT, STORE = "docs/integrate/contract.md", "docs/integrate/store.md"
PAGE = (ROOT / CONTRACT).read_text()
SECONDS = {"verify_s", "pause_s", "load_s", "total_s"}
NOT_COMPARED = {"message", "devices", "engine_version", *SECONDS}
"""Fields whose values differ between machines, or whose text another test holds."""


class Exchange(NamedTuple):
    """A curl command of the page, and what it prints."""

    words: list[str]
    printed: str

    def option(self, *names: str) -> list[str]:
        return [value for name, value in pairwise(self.words) if name in names]

    @property
    def answers(self) -> list[Any]:
        """The JSON values that it prints, and the status if it prints that."""
        values = []
        text = self.printed.strip()
        decoder = json.JSONDecoder()
        while text:
            value, end = decoder.raw_decode(text)
            values.append(value)
            text = text[end:].lstrip()
        return values


def _exchanges(digest: str) -> Iterator[Exchange]:
    """Yield the exchanges in the order of the page. `digest` replaces the manifest digest on the page."""
    (shown,) = set(re.findall(r"\b[0-9a-f]{32}\b", PAGE))
    for block in blocks(CONTRACT, language="console"):
        for command in re.split(r"^\$ ", block.text.replace(shown, digest), flags=re.MULTILINE)[1:]:
            line, _, printed = command.partition("\n")
            yield Exchange(shlex.split(line), printed)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    """A store in the current folder, with the version that the script on the page writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TANDEM_TOKEN", raising=False)
    monkeypatch.delenv("TANDEM_TOKEN_FILE", raising=False)
    for block in blocks(STORE, language="python"):
        exec(compile(block.text, str(block), "exec"), {})
    return WeightStore(Path("weights"))


@pytest.fixture
async def generator(store: WeightStore) -> AsyncIterator[httpx.AsyncClient]:
    """The mock generator of the page, started on an empty store."""
    (command,) = [block.text for block in blocks(CONTRACT, language="sh") if "tandem_generator" in block.text]
    assert "--engine mock --model mock --generator-id replica-0 --port 8000" in command
    served = WeightStore(Path("served"))
    switcher = WeightSwitcher(MockEngine("mock", MockConfig(), None), served, GeneratorConfig(generator_id="replica-0"))
    await switcher.start()
    shutil.copytree(store.root, served.root, dirs_exist_ok=True)  # the page's reader writes while the generator runs
    transport = httpx.ASGITransport(build_app(switcher, "mock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client
    await switcher.close()


async def test_every_request_of_the_page_gets_the_answer_of_the_page(
    generator: httpx.AsyncClient, store: WeightStore
) -> None:
    (request,) = blocks(CONTRACT, language="json")
    exchanges = list(_exchanges(store.read(store.versions()[0])[1]))
    assert len(exchanges) >= 10
    for exchange in exchanges:
        (url,) = [word for word in exchange.words if word.startswith("http")]
        body = "".join(exchange.option("-d")).replace("@request.json", request.text) or None
        (method,) = exchange.option("-X") or ["POST" if body else "GET"]
        headers = dict(header.split(": ", 1) for header in exchange.option("-H"))
        response = await generator.request(method, url, content=body, headers=headers)
        got = [json.loads(line) for line in response.text.splitlines()]
        if exchange.option("-w"):
            got.append(response.status_code)
        assert _comparable(got) == _comparable(exchange.answers), exchange.words


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: None if name in NOT_COMPARED else _comparable(inner) for name, inner in value.items()}
    return [_comparable(inner) for inner in value] if isinstance(value, list) else value


def test_every_route_is_on_the_page() -> None:
    paths = {value for name, value in vars(routes).items() if name.isupper() and isinstance(value, str)}
    assert len(paths) >= 8
    assert [path for path in paths if not re.search(rf"^\| \[`\w+ {re.escape(path)}`\]", PAGE, re.MULTILINE)] == []


def test_every_error_is_on_the_page_with_its_status_and_retry_advice() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\d+) \| (yes|no) \|", PAGE, re.MULTILINE)
    documented = {
        code: (int(status), retry == "yes") for codes, status, retry in rows for code in re.findall(r"\w+", codes)
    }
    ours = {code: error for code, error in _tree(TandemError).items() if error.__module__ == TandemError.__module__}
    assert documented == {code: (error.status, error.retryable) for code, error in ours.items()}


def test_every_field_of_info_is_on_the_page() -> None:
    section = PAGE.partition("\n## GET /info\n")[2].partition("\n## ")[0]
    rows = "".join(re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE))
    assert [name for name in Info.model_fields if f"`{name}`" not in rows] == []


def test_the_stores_page_shows_a_manifest_and_a_lease_that_the_script_leaves(store: WeightStore) -> None:
    shown, delta, lease = (json.loads(block.text) for block in blocks(STORE, language="json"))
    Changes.model_validate_json(json.dumps(delta["delta"]))
    Lease.model_validate(lease)
    manifest, digest = store.read(store.versions()[0])
    written = manifest.model_dump(mode="json")
    tensors = [tensor for tensor in written["tensors"] if tensor in shown["tensors"]]
    assert Manifest.model_validate(written | {"tensors": tensors}) == Manifest.model_validate(shown)
    assert len(written["tensors"]) == 11, "as the page says"
    assert digest in (ROOT / STORE).read_text()
