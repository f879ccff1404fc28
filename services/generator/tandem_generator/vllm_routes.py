"""Routes of vLLM that its clients ask for at the start, for both engines and without vLLM's development mode."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from tandem_protocol import routes as paths

from .weight_switcher import WeightSwitcher

MAX_LOGPROBS = 100
"""Most logprobs per token that a client may ask for: the default of TRL's `get_sequence_logprobs`. vLLM's is 20."""
REPLACED = frozenset({"/server_info", "/get_world_size", "/reset_prefix_cache"})
"""Routes of vLLM's development mode that Tandem answers itself, in both modes. vLLM counts its ranks in the answer to
`/get_world_size`, and TRL would wait for them."""


def build_vllm_routes(switcher: WeightSwitcher, model: str) -> APIRouter:
    """Return a router with `/health`, `/server_info`, `/get_world_size` and `/reset_prefix_cache`.

    The caller removes those in `REPLACED` that vLLM has. vLLM's own `/health` stays, and comes first.

    Args:
        switcher: Serves the requests.
        model: The value of `shared.model`.
    """
    router = APIRouter(tags=["vllm"])

    @router.get(paths.VLLM_HEALTH)
    async def health() -> Response:
        """Report that the process is alive, with an empty body."""
        return Response()

    @router.get("/server_info")
    async def server_info(config_format: str = "text") -> dict[str, Any]:
        """Describe the engine as vLLM does. Of its configuration, only what other projects read is here."""
        config = _config(switcher, model)
        return {"vllm_config": config if config_format == "json" else str(config)}

    @router.get("/get_world_size")
    async def get_world_size() -> dict[str, int]:
        """Return the number of ranks that can join an NCCL group: none, because weights come from the weight store.

        TRL asks before it makes that group. With more than 0, it would wait five minutes for the others, and then hide
        that the generator has refused the group.
        """
        return {"world_size": 0}

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> dict[str, bool]:
        """Do nothing: a switch empties the cache, so it never holds anything of older weights."""
        return {"success": True}

    return router


def _config(switcher: WeightSwitcher, model: str) -> dict[str, Any]:
    facts = switcher.engine.facts
    return {
        "model_config": {
            "model": model,
            "dtype": facts.dtype,
            "max_model_len": facts.max_model_len,
            "logprobs_mode": "processed_logprobs",
        },
        "parallel_config": {"world_size": facts.world_size},
        "weight_transfer_config": {"backend": "tandem"},
        "lora_config": None,
    }
