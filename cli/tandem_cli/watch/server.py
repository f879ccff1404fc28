"""The web server of `tandem watch`: the page, its data as JSON, and plotly.js from plotly's package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi import Query as Parameters
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

from .guard import Guard
from .rollouts import Moved, Query
from .runs import WatchedRun

STATIC = Path(__file__).parent / "static"


class _Json(JSONResponse):
    """JSON in ASCII: a completion may hold half of a surrogate pair, which UTF-8 cannot express."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _chosen(request: Request, number: int) -> WatchedRun:
    runs: Sequence[WatchedRun] = request.app.state.runs
    if not 0 <= number < len(runs):
        raise HTTPException(404, f"got run {number}, expected 0 to {len(runs) - 1}")
    return runs[number]


Chosen = Annotated[WatchedRun, Depends(_chosen)]
routes = APIRouter(prefix="/api/runs")


@routes.get("")
def _states(request: Request) -> _Json:
    return _Json([run.state() for run in request.app.state.runs])


@routes.get("/{number}/steps")
def _steps(run: Chosen, after: str = "") -> _Json:
    return _Json(run.steps.read(after))


@routes.get("/{number}/evaluations")
def _evaluations(run: Chosen, after: str = "") -> _Json:
    return _Json(run.evaluations.read(after))


@routes.get("/{number}/events")
def _events(run: Chosen, after: str = "") -> _Json:
    return _Json(run.timeline.read(after))


@routes.get("/{number}/steps/{step}/rollouts")
def _step(run: Chosen, step: int, after: int | None = None) -> _Json:
    return _Json(run.rollouts.of_step(step, after))


@routes.get("/{number}/rollouts/{offset}")
def _rollout(run: Chosen, offset: int) -> _Json:
    return _Json(run.rollouts.one(offset))


@routes.get("/{number}/search")
def _search(run: Chosen, query: Annotated[Query, Parameters()]) -> _Json:
    return _Json(run.rollouts.search(query))


def make_app(runs: Sequence[WatchedRun], token: str, host: str, url: str = "") -> FastAPI:
    """Return the web application. It only reads, and only answers requests with the token."""
    app = FastAPI(openapi_url=None)
    app.state.runs = runs
    app.middleware("http")(Guard(token, host, url))
    app.include_router(routes)
    app.mount("/plotly", StaticFiles(directory=plotly_folder()))
    app.mount("/", StaticFiles(directory=STATIC, html=True))

    @app.exception_handler(Moved)
    def moved(*_: Any) -> _Json:
        return _Json({"detail": "The run was resumed from an earlier step, so its files have changed."}, 409)

    return app


def plotly_folder() -> Path:
    """Return the folder of plotly.min.js in plotly's package, without importing the package, which takes seconds."""
    spec = find_spec("plotly")
    assert spec is not None, "the command checks that it is installed"
    assert spec.origin is not None
    return Path(spec.origin).parent / "package_data"
