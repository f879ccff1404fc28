"""Publish a model to a store, without a generator or with the mock."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from anyio.from_thread import start_blocking_portal
from transformers import PreTrainedModel

from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.messages import PROTOCOL_VERSION
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient
from tandem_trainer.publish import Publisher, fingerprint_of

TIMEOUT_S = 120.0


class NoGenerator:
    """Stands for the client of the generators where no generator can run: a publish ends after the commit."""

    protocols = SimpleNamespace(oldest=PROTOCOL_VERSION)

    def expect(self, _version: Version) -> None:
        pass

    async def set_weights(self, *_: Any) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        pass


def mock_missing() -> str | None:
    """Say why the mock generator cannot run here. None if it can."""
    lacking = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacking)} not installed" if lacking else None


@contextmanager
def publisher(
    model: PreTrainedModel,
    model_dir: Path,
    root: Path,
    accelerator: Accelerator,
    *,
    dtype: torch.dtype,
    mock: bool = False,
    seen: Path | None = None,
    made: Path | None = None,
    delta: str = "never",
    keep: int = 1,
    report: Callable[[dict[str, float], int], object] = lambda _timings, _bytes: None,
) -> Iterator[tuple[Publisher, WeightStore]]:
    """Yield the trainer's publisher and its store, in the new folder `root`.

    Args:
        mock: start a mock generator, which verifies each version and serves it.
        seen: the folder of the store as the generator sees it. None: the same as the trainer's.
        made: the folder in which the generator makes the files of deltas. None: a folder of `root`.
        delta: `trainer.publish.delta`.
        report: receives the seconds of each phase of a publish, and its bytes.
    """
    store = WeightStore(root / "weights")
    with ExitStack() as stack:
        stack.enter_context(store.writer("tests/gpu"))
        portal = stack.enter_context(start_blocking_portal())
        client: Any = NoGenerator()
        if mock:
            from support.generators import TOKEN, running

            log = model_dir.parent / f"mock-{root.name}.log"
            option = f"--generator.materialize_dir={made or root / 'made'}"
            generator = stack.enter_context(running("mock", model_dir, seen or store.root, option, log=log))
            url = f"http://127.0.0.1:{generator.port}"
            client = portal.call(lambda: GeneratorClient([url], TOKEN))  # the client has to be made in the loop
        stack.callback(lambda: portal.call(client.close))
        yield (
            Publisher(
                store=store,
                client=client,
                portal=portal,
                wait=_wait,
                config=PublishConfig.model_validate({"keep": keep, "timeout_s": TIMEOUT_S, "delta": delta}),
                run_name="gpu",
                attempt=1,
                model_fingerprint=fingerprint_of(model, model_dir),
                dtype=dtype,
                accelerator=accelerator,
                report=report,
            ),
            store,
        )


def _wait(task: Future[Any] | None) -> None:
    if task is not None:
        task.result(TIMEOUT_S)
