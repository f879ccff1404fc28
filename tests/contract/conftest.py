"""One running generator per engine, for all contract tests over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.generators import running
from support.models import make_tiny_model
from support.reference_policy import ReferencePolicy
from support.served import MAX_MODEL_LEN, Served
from tandem_protocol.store import WeightStore

ENGINES = ["mock", pytest.param("vllm", marks=pytest.mark.vllm)]
MOCK = ["--generator.mock.faults.token_latency_s", "0.001"]
"""Makes requests last long enough that a test can act while one is running."""
COMMON = ["--visible-timeout-s", "1", "--generator-id", "replica-0"]


@pytest.fixture(scope="session", params=ENGINES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = request.param
    root = tmp_path_factory.mktemp(engine)
    model = make_tiny_model(root / "model", initializer_range=0.3, max_position_embeddings=MAX_MODEL_LEN)
    arguments = [*COMMON, *(MOCK if engine == "mock" else [])]
    with running(engine, model, root / "weights", *arguments, log=root / "generator.log") as generator:
        yield Served(generator, ReferencePolicy(model, WeightStore(root / "weights")))
