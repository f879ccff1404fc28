"""The client that takes the place of TRL's `VLLMClient`.

TRL's versions pass other arguments and expect other answers. The client reads both from the signatures of the class
that it replaces, `original`.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit
from weakref import ReferenceType

import torch
from torch import Tensor

from tandem_protocol.config import ConfigError, read_token
from tandem_protocol.config.trl import TrlSettings
from tandem_protocol.errors import WeightsRefused
from tandem_protocol.manifest import parameters_digest
from tandem_protocol.messages import Completion, Group, ModelFingerprint, Prompt, RolloutRequest, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient

from ..devices import cpu_as_accelerator
from ..learner.safetensors_file import write_safetensors
from ..run.stopping import StopRequest
from .completions import check_token_ids, refuse, sampling_options, shaped
from .stop_strings import StopStrings

log = logging.getLogger(__name__)

HEADER_BYTES = 1 << 20
_CLOSE_TIMEOUT_S = 10.0
_SHARD = "model-00001-of-00001.safetensors"
_CHANGED_MODEL = (
    "The generators load the model that the script names. If the script changes it afterwards, for example with "
    "resize_token_embeddings: save it and its tokenizer into a folder, and have the script load that folder."
)

ResultT = TypeVar("ResultT")


class TandemClient:
    """Samples with `POST /rollouts`, and publishes weights through the weight store.

    The process that makes it is the only one that publishes. A generator that dies is waited for. It cannot answer with
    older weights, because every request names the version that was published last.
    """

    original: ClassVar[type[Any]]
    """TRL's client."""
    settings: ClassVar[TrlSettings]
    generators: ClassVar[tuple[str, ...]] = ()
    """Base URLs of the generators. Empty: the address that the script names."""
    trainer: ClassVar[ReferenceType[Any] | None] = None
    """The trainer that was made last. It makes its client while it is made."""
    stop: ClassVar[StopRequest] = StopRequest()
    """Whether the process was asked to stop. It then waits for generators for some seconds only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self._named("__init__", args, kwargs)
        url = given.get("base_url") or f"http://{given['host']}:{given['server_port']}"
        urls, token = self._address(url)
        self._trainer = self.trainer
        self._version: Version | None = None
        self._attempt = 0
        self._pending: dict[str, Tensor] = {}
        self._collects = False
        self._client = GeneratorClient(urls, token, stall_timeout_s=self.settings.trainer.rollout.stall_timeout_s)
        self._loop = asyncio.new_event_loop()
        # A thread that is not a daemon would keep the script alive after its end.
        thread = threading.Thread(target=self._loop.run_forever, name="tandem-trl", daemon=True)
        thread.start()
        self._life = ExitStack()
        self._life.callback(self._stop, thread)
        # The thread ends with the trainer, or else with the process.
        weakref.finalize((self._trainer and self._trainer()) or self, self._life.close)
        self.check_server(given["connection_timeout"])
        # Before `init_communicator`, some trainers ask torch for an accelerator, and fail where there is none.
        self._accelerator = self._life.enter_context(ExitStack())
        self._accelerator.enter_context(cpu_as_accelerator())

    def _address(self, url: str) -> tuple[tuple[str, ...], str | None]:
        """Return the generators and their token. The script's URL may hold the token as its password."""
        parts = urlsplit(url)
        token = read_token() or (unquote(parts.password) if parts.password else None)
        script = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
        return self.generators or (script,), token

    def _named(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name the arguments as this version of TRL names them, with its defaults."""
        bound = inspect.signature(getattr(self.original, method)).bind(self, *args, **kwargs)
        bound.apply_defaults()
        return {name: value for name, value in bound.arguments.items() if name != "self"}

    def _wait(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run `work` in the client's event loop. It has a deadline of its own.

        Raises:
            Stopped: The process was asked to stop, and `work` did not end soon.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return self.stop.wait(future)
        except BaseException:
            future.cancel()
            raise

    # -- the server ----------------------------------------------------------------------------------------------

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:  # noqa: ARG002 - TRL's
        """Wait until every generator is ready.

        Raises:
            TimeoutError: A generator is not ready in time.
        """
        self._wait(self._client.wait_ready(max(total_timeout, 1.0)))
        self._infos = list(self._wait(self._client.info(max(total_timeout, 1.0))).values())

    def get_server_info(self) -> dict[str, Any]:
        """Return what TRL reads of vLLM's configuration."""
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def get_world_size(self) -> int:
        """Return the number of the generators' ranks."""
        return sum(info.world_size for info in self._infos)

    # -- weights -------------------------------------------------------------------------------------------------

    def init_communicator(self, device: Any = None) -> None:  # noqa: ARG002 - TRL's
        """Become the store's writer, under an attempt that every generator takes as newer.

        Raises:
            StoreLocked: Another process writes the store.
        """
        self._accelerator.close()
        self._store = _writer(self.settings.shared.weights_dir.absolute())
        self._attempt = max([self._store.next_attempt(), *(info.version.attempt + 1 for info in self._infos)])

    @contextmanager
    def weight_update(self) -> Iterator[None]:
        """Publish the parameters that are updated in the block as one version."""
        self._collects = True
        try:
            yield
            self._publish_pending()
        finally:
            self._collects = False
            self._pending = {}

    def update_named_param(self, name: str, weights: Tensor) -> None:
        """Take one parameter of the next version, which `weight_update` or `reset_prefix_cache` publishes.

        It is copied, because TRL takes a merged adapter out again, and frees a gathered parameter.
        """
        self._pending[name] = weights.detach().to("cpu", copy=True)

    def update_named_params(
        self, metadata: Iterable[tuple[str, str, list[int]]], named_params: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Publish parameters as they come, without a copy.

        Args:
            metadata: Name, dtype and shape of each parameter.
            named_params: The parameters in the same order.
        """
        if self._collects:
            for name, tensor in named_params:
                self.update_named_param(name, tensor)
            return
        table = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, dtype, shape in metadata
        }
        tensors = (tensor.detach() for _, tensor in named_params)
        try:
            self._publish(table, tensors)
        finally:
            for _ in tensors:  # the other ranks gather all of them, even if the disk of this one is full
                pass

    def update_model_params(self, model: torch.nn.Module) -> None:
        """Publish all parameters of `model`."""
        named = list(model.named_parameters())
        kinds = [
            (name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape)) for name, parameter in named
        ]
        self.update_named_params(kinds, named)

    def reset_prefix_cache(self) -> None:
        """Publish the parameters of `update_named_param`. The switch itself resets the cache."""
        self._publish_pending()

    def _publish_pending(self) -> None:
        tensors, self._pending = self._pending, {}
        if tensors:
            self._publish({name: tensor.to("meta") for name, tensor in tensors.items()}, tensors.values())

    def _publish(self, table: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
        """Write a version, and wait until the generators serve it.

        Raises:
            StoreError: The volume is full.
            TandemError: A generator refuses the version.
            TimeoutError: A generator does not serve it in time.
        """
        if not self._attempt:  # TRL 0.16 does not call it
            self.init_communicator()
        config, version, began = self.settings.trainer.publish, self._next_version(), time.monotonic()
        shapes = {name: tuple(tensor.shape) for name, tensor in table.items()}
        needs_bytes = sum(tensor.nbytes for tensor in table.values()) + HEADER_BYTES
        self._store.retain(config.keep)
        with self._store.staging(version, needs_bytes=needs_bytes) as staged:
            digest = write_safetensors(staged / _SHARD, table, tensors)
            fingerprint = ModelFingerprint(parameters=parameters_digest(shapes))
            _, manifest = self._store.commit(
                staged, version, run="TRL", fingerprint=fingerprint, digests={_SHARD: digest}
            )
        try:
            self._wait(self._client.set_weights(version, SetWeights(manifest_digest=manifest), config.timeout_s))
        except WeightsRefused as error:
            raise WeightsRefused(f"{error} {_CHANGED_MODEL}") from error
        self._store.retain(config.keep)
        self._version = version
        log.info("published version %s in %.2f s", version, time.monotonic() - began)

    def _next_version(self) -> Version:
        """The trainer's step, or the next one if TRL publishes twice in a step."""
        trainer = self._trainer and self._trainer()
        step = trainer.state.global_step if trainer else 0
        return Version(max(step, self._version.step + 1 if self._version else 0), self._attempt)

    # -- completions ---------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample completions of prompts, which are texts or token ids.

        Returns:
            What this version of TRL expects: the token ids of the completions, or a mapping of `prompt_ids`,
            `completion_ids`, `logprobs` and `logprob_token_ids`.
        """
        given = self._named("generate", args, kwargs)
        prompts = list(given.pop("prompts"))
        if prompts and isinstance(prompts[0], str):
            prompts = self._tokenizer()(prompts, add_special_tokens=False)["input_ids"]  # as the trainer does
        return self._answer(prompts, given)

    def chat(self, *args: Any, **kwargs: Any) -> Any:
        """Sample answers to conversations. Returns what `generate` returns."""
        given = self._named("chat", args, kwargs)
        conversations = given.pop("messages")
        parts = [p for c in conversations for m in c if isinstance(m.get("content"), list) for p in m["content"]]
        if any(part.get("type") != "text" for part in parts):
            refuse("images")
        given.pop("max_concurrent_requests", None)
        options = given.pop("chat_template_kwargs", None) or {}
        names = [name for name in ("tools", "chat_template") if given.get(name)]
        template = {name: given[name] for name in names} | {"add_generation_prompt": True} | options
        render = functools.partial(self._tokenizer().apply_chat_template, tokenize=True, return_dict=False, **template)
        prompts = [render(conversation) for conversation in conversations]
        return self._answer(prompts, {k: v for k, v in given.items() if k not in ("tools", "chat_template")})

    def _answer(self, prompts: list[list[int]], given: dict[str, Any]) -> Any:
        has_logprobs = given.get("logprobs", 0) is not None
        returned = inspect.signature(self.original.generate)
        return shaped(returned, prompts, self._sample(prompts, given), has_logprobs=has_logprobs)

    def _sample(self, prompts: list[list[int]], given: dict[str, Any]) -> list[Completion]:
        """Return the completions of all prompts, in the order of the prompts.

        Raises:
            ConfigError: An option is not one of a rollout.
            TandemError: A generator refuses the request.
            TimeoutError: Completions are missing at the deadline.
        """
        self._publish_pending()
        stop, (seed, sampling) = StopStrings(given), sampling_options(given)
        rows = tuple(Prompt(token_ids=tuple(ids), seed=seed) for ids in prompts)
        request = RolloutRequest(prompts=rows, sampling=sampling, min_version=self._version)
        groups: dict[int, Group] = {}

        def take(group: Group) -> None:
            groups[group.prompt_index] = group

        self._wait(self._client.rollouts(request, take, timeout_s=self.settings.trainer.rollout.timeout_s))
        for group in groups.values():
            check_token_ids(group.completions, self._trainer and self._trainer(), self._infos[0].model)
        tokenizer = self._tokenizer() if stop else None
        return [
            stop.cut(prompt, completion, tokenizer)
            for index, prompt in enumerate(prompts)
            for completion in groups[index].completions
        ]

    def _tokenizer(self) -> Any:
        trainer = self._trainer and self._trainer()
        tokenizer = getattr(trainer, "processing_class", None)
        if tokenizer is None:
            raise ConfigError("got text without a trainer, expected token ids. Fix: tokenize the prompts.")
        return getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one

    def image_features(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse images."""
        refuse("images")

    def get_sequence_logprobs(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to be a teacher."""
        refuse("scores of given sequences, such as a teacher's")

    # -- the end -------------------------------------------------------------------------------------------------

    def close_communicator(self) -> None:
        """Close the connections and end the thread. Nothing happens the second time."""
        self._life.close()

    def _stop(self, thread: threading.Thread) -> None:
        if thread is threading.current_thread():  # the trainer was collected as garbage here
            return self._loop.stop()
        with suppress(Exception):  # the process ends, and a generator may be gone
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(_CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join(_CLOSE_TIMEOUT_S)
        if not thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        await self._client.close()
        await self._loop.shutdown_default_executor()  # its threads look up host names


@functools.cache
def _writer(root: Path) -> WeightStore:
    """Be the only writer of the store until this process ends, for all trainers of the script."""
    store = WeightStore(root)
    life = ExitStack()
    life.enter_context(store.writer(f"TRL, process {os.getpid()}"))
    atexit.register(life.close)
    return store
