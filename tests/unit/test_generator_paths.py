"""With `root_path`, as behind a proxy, a generator has the same open and the same refused routes."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tandem_generator.auth import ROUND_THE_SWITCHER, BearerAuth
from tandem_protocol.config import TOKEN_ENV
from tandem_protocol.routes import OPEN

TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture(params=["", "/x", "/x/y"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Return a client of an app with the root path `client.app.root_path`. All its routes answer."""
    monkeypatch.setenv(TOKEN_ENV, "secret")
    app = FastAPI(root_path=request.param)

    async def answer() -> None: ...

    for path in (*OPEN, *ROUND_THE_SWITCHER, "/adapters/name", "/weights"):
        app.add_api_route(path, answer, methods=["GET", "POST"])
    app.add_middleware(BearerAuth)
    client = TestClient(app)
    assert client.post(f"{request.param}/weights", headers=TOKEN).status_code == 200
    return client


@pytest.fixture
def roots(client: TestClient) -> list[str]:
    """Return what the paths of requests may begin with: a proxy may remove the root path."""
    return sorted({"", client.app.root_path})  # type: ignore[attr-defined] # it is an app of FastAPI


@pytest.mark.parametrize("path", sorted(ROUND_THE_SWITCHER | {"/adapters/name"}))
def test_no_path_goes_round_the_switcher(client: TestClient, roots: list[str], path: str) -> None:
    for root in roots:
        for end in ("", "/"):
            response = client.post(f"{root}{path}{end}", headers=TOKEN)
            assert (response.status_code, response.json()["code"]) == (422, "bad_request"), root


@pytest.mark.parametrize("path", sorted(OPEN))
def test_probes_need_no_token(client: TestClient, roots: list[str], path: str) -> None:
    assert [client.get(root + path).status_code for root in roots] == [200] * len(roots)


@pytest.mark.parametrize("path", ["/weights", "/pause", "/healthzz", "/other/healthz"])
def test_other_routes_need_the_token(client: TestClient, roots: list[str], path: str) -> None:
    assert [client.get(root + path).status_code for root in roots] == [401] * len(roots)
