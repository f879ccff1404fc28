"""What Tandem adds to vLLM's workers: a load of weights that returns its error.

vLLM's executor stops at the first worker that raises an error. The answers of the others stay in their queues, and the
next call takes them for its own. So a load that breaks could not be rolled back if its error was raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from tandem_protocol.problems import one_line

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

log = logging.getLogger(__name__)

EXTENSION = f"{__name__}.TandemWorker"
ADAPTER = "tandem"


class TandemWorker:
    """vLLM makes this a base class of its worker, so its methods can be called on all workers of an engine.

    They return what went wrong, and an empty text if nothing did.
    """

    def tandem_prepare(self: Any, init_info: dict[str, Any]) -> str:
        """Test that the weights can be switched."""
        return _problem(_prepare, self, init_info)

    def tandem_load_weights(self: Any, shards: list[str]) -> str:
        """Load the weights in `shards`. If there are none, load those that the model was loaded with."""
        return _problem(_load_weights, self, shards)

    def tandem_load_adapter(self: Any, folder: str) -> str:
        """Load the adapter in `folder` in place of the one that is loaded."""
        return _problem(_load_adapter, self, folder)


def adapter_request(folder: str | Path, *, load_inplace: bool = False) -> LoRARequest:
    """Return vLLM's name for the adapter in `folder`."""
    return LoRARequest(ADAPTER, 1, str(folder), load_inplace=load_inplace)


def _prepare(worker: WorkerBase, init_info: dict[str, Any]) -> None:
    worker.init_weight_transfer_engine(init_info)


def _load_weights(worker: WorkerBase, shards: list[str]) -> None:
    worker.start_weight_update()
    worker.update_weights({"shards": shards})
    worker.finish_weight_update()


def _load_adapter(worker: WorkerBase, folder: str) -> None:
    if not worker.add_lora(adapter_request(folder, load_inplace=True)):
        raise ValueError(f"vLLM did not load the adapter in {folder}")


def _problem(do: Callable[[WorkerBase, Any], None], worker: WorkerBase, argument: Any) -> str:
    try:
        do(worker, argument)
    except ValueError as error:
        return str(error) or one_line(error)
    except Exception as error:  # any type: vLLM's and the model's own code run here
        log.exception("%s failed", do.__name__)
        return one_line(error)
    return ""
