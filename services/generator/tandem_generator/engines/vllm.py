"""The vLLM engine. It calls vLLM's engine client directly, in the server's process."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from pydantic import ValidationError
from vllm.model_executor.model_loader import get_model_cls
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from tandem_protocol.config import ConfigError
from tandem_protocol.errors import BadRequest, EngineFailed, not_finite
from tandem_protocol.fingerprint import fingerprint, model_files
from tandem_protocol.manifest import ADAPTER_CONFIG_NAME
from tandem_protocol.messages import Completion, Group, Prompt, RolloutRequest, Sampling, SwitchMode, VersionSpan
from tandem_protocol.parameters import Shapes, own_tensors
from tandem_protocol.problems import one_line, summarize
from tandem_protocol.version import BASE, Version

from ..vllm_worker import adapter_request
from .base import EngineFacts, OnTokens, no_count

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

REHEARSED_TOKENS = (3, 20, 40)
"""Lengths of the prompts that are sampled as a test before the engine serves, in tokens."""
TOKENS_PER_PART = 16
"""Tokens after which vLLM reports a part of a completion. Each report costs time in the server's event loop."""
_PAUSE_MODES = {SwitchMode.DRAIN: "wait", SwitchMode.IN_FLIGHT: "keep", SwitchMode.ABORT: "abort"}


class VllmEngine:
    """Engine that uses vLLM's engine client. `attach` must be called first, when vLLM has started its engine."""

    facts: EngineFacts
    _client: AsyncLLM

    def attach(self, client: AsyncLLM, devices: tuple[str, ...], *, takes_seeds: bool, trust_remote_code: bool) -> None:
        """Use `client` from now on, and collect `facts`.

        Args:
            client: vLLM's engine client.
            devices: Devices that the engine runs on.
            takes_seeds: Pass seeds to vLLM. If False, completions are not repeatable.
            trust_remote_code: Run the model's own code to get the parameter table.
        """
        self._client = client
        self._takes_seeds = takes_seeds
        self._adapter: LoRARequest | None = None
        lora = client.vllm_config.lora_config
        model = client.model_config
        parallel = client.vllm_config.parallel_config
        directory = _local_directory(model.model, model.revision)
        shapes, layers = _parameter_tables(directory, trust_remote_code=trust_remote_code)
        self.facts = EngineFacts(
            engine="vllm",
            engine_version=vllm.__version__,
            devices=devices,
            world_size=parallel.world_size_across_dp,
            max_model_len=model.max_model_len,
            max_num_seqs=client.vllm_config.scheduler_config.max_num_seqs,
            vocab_size=model.get_vocab_size(),
            base_shards=tuple(model_files(directory)),
            shapes=shapes,
            fingerprint=fingerprint(directory, shapes),
            # With LoRA, layers are wrapped, so a full version would not find their weights.
            kinds=frozenset({"lora" if lora else "full"}),
            max_lora_rank=lora.max_lora_rank if lora else 0,
            dtype=_dtype(client),
            layers=layers,
            lora_heads=_output_embeddings(model) if lora else (),
            one_host=parallel.nnodes == 1 and parallel.data_parallel_size_local == parallel.data_parallel_size,
        )

    async def start(self) -> None:
        """Test a switch of weights and a few rollouts, so that problems are found before the engine serves.

        Raises:
            ConfigError: The model's weights cannot be switched, or vLLM cannot run the model on this machine.
        """
        facts = self.facts
        info = {
            "switches": "full" in facts.kinds,
            "table": {name: list(shape) for name, shape in (facts.shapes or {}).items()},
            "shards": [str(file.resolve()) for file in facts.base_shards],
        }
        if problem := await self._on_all_workers("tandem_prepare", info):
            raise ConfigError(f"shared.model: {problem}")
        await self._client.update_weight_version(str(BASE))
        try:
            await self._rehearse()
        except (EngineDeadError, EngineGenerateError) as error:
            raise ConfigError(
                f"shared.model: vLLM {vllm.__version__} has loaded {self._client.model_config.model!r}, but its engine "
                "ended in the first rollouts; its log above says why. Fix: models with recurrent layers may need "
                "generator.enable_prefix_caching: false, and some need a GPU; otherwise choose another shared.model "
                "(docs/reference/architectures.md)"
            ) from error

    async def _rehearse(self) -> None:
        """Sample a few rollouts at the same time. A single token would not use all parts of a model."""
        params = SamplingParams(n=2, max_tokens=2, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False)
        longest = max(1, self.facts.max_model_len - 2)
        await asyncio.gather(*(self._run([0] * min(length, longest), params) for length in REHEARSED_TOKENS))

    async def generate(self, request: RolloutRequest, on_tokens: OnTokens = no_count) -> AsyncGenerator[Group, None]:
        count = None if request.heartbeat_s is None else on_tokens
        tasks = [
            asyncio.create_task(self._group(index, prompt, request.sampling, count))
            for index, prompt in enumerate(request.prompts)
        ]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFailed(f"vLLM's engine failed: {error!r}; see its log") from error
        except ValidationError as error:
            raise EngineFailed(f"vLLM's engine returned an invalid completion: {summarize(error.errors())}") from error
        except ValueError as error:
            raise BadRequest(f"vLLM refuses this request: {error}") from error
        finally:
            for task in tasks:
                task.cancel()  # vLLM aborts the request if its caller is cancelled
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(self, index: int, prompt: Prompt, sampling: Sampling, count: OnTokens | None) -> Group:
        params = sampling_params(sampling, prompt.seed if self._takes_seeds else None, in_parts=count is not None)
        completions = await self._run(prompt.token_ids, params, count or no_count)
        return Group(prompt_index=index, completions=tuple(map(_completion, completions)))

    async def _run(
        self, token_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens = no_count
    ) -> list[list[CompletionOutput]]:
        """Return the parts of each completion, in order."""
        request = {"prompt_token_ids": list(token_ids)}
        name = f"tandem-{uuid.uuid4()}"
        parts: dict[int, list[CompletionOutput]] = {}
        async for output in self._client.generate(request, params, name, lora_request=self._adapter):
            for part in output.outputs:
                parts.setdefault(part.index, []).append(part)
                on_tokens(len(part.token_ids))
            if output.finished:
                return [parts[index] for index in sorted(parts)]
        raise EngineFailed("vLLM's engine ended a request without its output; see its log")

    async def pause(self, mode: SwitchMode) -> None:
        # The two calls of vLLM's own `pause_generation`, without the 20 ms that it sleeps afterwards: they let results
        # arrive that were sent before. The engine has stamped those with their version, so they may arrive later.
        # clear_cache: the KV cache of running requests is recomputed with the new weights.
        await self._client.renderer.clear_mm_cache_async()
        await self._client.engine_core.pause_scheduler_async(mode=_PAUSE_MODES[mode], clear_cache=True)

    async def load_weights(self, version: Version, files: Sequence[Path]) -> None:
        if "lora" in self.facts.kinds:
            await self._load_adapter(files)
        elif problem := await self._on_all_workers("tandem_load_weights", [str(file.resolve()) for file in files]):
            raise ValueError(problem)
        await self._client.update_weight_version(str(version))

    async def _load_adapter(self, files: Sequence[Path]) -> None:
        """Replace the adapter, also for running requests. Without an adapter in `files`, use the base weights."""
        self._adapter = None
        if config := next((file for file in files if file.name == ADAPTER_CONFIG_NAME), None):
            folder = str(config.parent.resolve())
            if problem := await self._on_all_workers("tandem_load_adapter", folder):
                raise ValueError(problem)
            self._adapter = adapter_request(folder)

    async def _on_all_workers(self, method: str, argument: object) -> str:
        """Call a method of `TandemWorker` on all workers, and wait for all of them. Returns what went wrong first.

        vLLM's own methods return the answers of the first engine only. With data parallelism, there are several.
        """
        answers = await self._client.engine_core.call_utility_all_async(
            "collective_rpc", method, None, (argument,), None
        )
        return next((problem for engine in answers for problem in engine if problem), "")

    async def resume(self) -> None:
        await self._client.resume_generation()

    async def check(self) -> None:
        await self._run([0], SamplingParams(max_tokens=1, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False))

    async def close(self) -> None:
        """Do nothing: the server that started the engine stops it."""


def sampling_params(sampling: Sampling, seed: int | None, *, in_parts: bool = False) -> SamplingParams:
    """Convert the sampling parameters of the wire contract to vLLM's.

    Args:
        sampling: The parameters.
        seed: Seed of the first completion.
        in_parts: Return a completion in parts while it is sampled, instead of once at its end.
    """
    return SamplingParams(
        **sampling.model_dump(exclude={"stop_token_ids"}),
        stop_token_ids=list(sampling.stop_token_ids),
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if in_parts else RequestOutputKind.FINAL_ONLY,
        stream_interval=TOKENS_PER_PART if in_parts else None,
        skip_clone=True,
    )


def _completion(parts: Sequence[CompletionOutput]) -> Completion:
    last = parts[-1]
    if last.finish_reason not in {"stop", "length", "abort"}:
        raise EngineFailed(f"vLLM's engine ended a completion with {last.finish_reason!r}; see its log")
    return Completion(
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=_sampled_logprobs(parts),
        finish_reason=last.finish_reason,
        versions=tuple(
            VersionSpan(version=Version.parse(span.version), tokens=span.end - span.start)
            for span in last.weight_versions or ()
        ),
    )


def _sampled_logprobs(parts: Sequence[CompletionOutput]) -> tuple[float, ...]:
    """Return the logprobs [T] of the sampled tokens. At each position of a part, the sampled token comes first.

    Raises:
        LogprobsNotFinite: The model computes NaN or infinity.
    """
    logprobs = tuple(
        part.logprobs.logprobs[start]
        for part in parts
        if part.token_ids
        for start in part.logprobs.start_indices[: len(part.token_ids)]
    )
    for position, logprob in enumerate(logprobs):
        if not math.isfinite(logprob):
            raise not_finite(logprob, f"token {position} of a completion")
    return logprobs


def _dtype(client: AsyncLLM) -> str:
    """Return the data type, such as `bfloat16` or `bfloat16 with a KV cache of fp8`."""
    config = client.vllm_config
    dtype = str(client.model_config.dtype).removeprefix("torch.")
    cache = config.cache_config.cache_dtype
    return dtype if cache in ("auto", dtype) else f"{dtype} with a KV cache of {cache}"


def _local_directory(model: str, revision: str | None) -> Path:
    """Return the directory of `model`. vLLM has already downloaded it if it is on the hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def _output_embeddings(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of the output embeddings that can have an adapter in vLLM's implementation of `model`."""
    embeddings: Mapping[str, str] = getattr(get_model_cls(model), "embedding_modules", {})
    return tuple(name for name, role in embeddings.items() if role == "output_embeddings")


def _parameter_tables(directory: Path, *, trust_remote_code: bool) -> tuple[Shapes, Shapes]:
    """Return the parameter table of the model as the trainer publishes it, name → shape.

    Returns:
        The table with the names in a checkpoint, and the table with the names of the model's modules.

    Raises:
        ConfigError: `transformers` cannot create the model. Without its table, a version that lacks a tensor could not
            be refused.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # any type: the model's own code may run here
        raise ConfigError(
            f"shared.model: transformers cannot create {str(directory)!r} ({one_line(error)}). "
            "Expected a causal language model of transformers, because published weights are compared with its "
            "parameters. Fix: choose another shared.model (docs/reference/architectures.md)"
        ) from error
    layers = own_tensors(model)
    return _shapes(revert_weight_conversion(model, layers)), _shapes(layers)


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
