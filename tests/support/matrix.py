"""Train one model family in one process: load → compare logprobs → update → publish → compare logprobs.

It uses the real parts of generator and trainer, but an in-process HTTP transport. Other tests cover the start of the
services; separate processes would take a minute per family.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from accelerate import Accelerator
from anyio.from_thread import BlockingPortal, start_blocking_portal
from transformers import AutoTokenizer
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from support.architectures import VOCAB, make_architecture
from support.rollouts import scored
from tandem_generator.engines.vllm import VllmEngine
from tandem_generator.options import parse
from tandem_generator.plugin import devices, takes_seeds
from tandem_generator.server import build_app
from tandem_generator.vllm_server import parse_engine_args, start_errors
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.config import ConfigError, SharedConfig
from tandem_protocol.config.alerts import AlertsConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.errors import TandemError
from tandem_protocol.messages import Group, Prompt, RolloutRequest
from tandem_protocol.store import WeightStore
from tandem_rollout.client import GeneratorClient
from tandem_rollout.errors import UserError
from tandem_rollout.handshake import check_generators
from tandem_rollout.sampler import sampling
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.batch import Batch
from tandem_trainer.devices import make_accelerator
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.mismatch import MismatchCheck
from tandem_trainer.publish import Publisher, fingerprint_of

URL = "http://127.0.0.1:1"
PROMPT_LENGTHS = (3, 20, 40)
"""In tokens. The longest exceeds the sliding windows of the tiny models."""
MAX_MODEL_LEN = 128


@dataclass(frozen=True)
class Outcome:
    """The result for one family."""

    outcome: str
    """`trained`, `alerted` (trained, but trainer and generator differ by more than rounding), `refused` or `failed`."""
    reason: str = ""
    before: float | None = None
    """The largest |generator logprob − trainer logprob| of a sampled token, in nats."""
    after: float | None = None
    """The same after each of two updates that were published to the running engine: the larger of both."""
    moved: float | None = None
    """The largest change of a logprob by an update, in nats: the smaller of both. With the old weights, `after` would
    be as large."""
    seconds: float = 0.0


def judge(family: str, folder: Path, **changes: Any) -> Outcome:
    """Return the outcome of a tiny model of `family`. Never raises."""
    began = time.monotonic()
    try:
        model = make_architecture(folder / "model", family, **changes)
        outcome = _trained(model, folder)
    except (UserError, ConfigError, TandemError) as error:
        outcome = Outcome("refused", str(error))
    except BaseException as error:
        traceback.print_exc()
        outcome = Outcome("failed", f"{type(error).__name__}: {error}")
    reason = _lasting(outcome.reason.replace(str(folder / "model"), "MODEL"))
    return Outcome(**asdict(outcome) | {"reason": reason, "seconds": round(time.monotonic() - began, 1)})


def _lasting(message: str) -> str:
    """Return the part of a message that is the same in every run: its first sentence, without figures."""
    return re.sub(r"-?\d+\.\d{3,}|(?<=differ by )\S+", "…", " ".join(message.partition(". ")[0].split()))


def _trained(model: Path, folder: Path) -> Outcome:
    config = _config(folder)
    accelerator = make_accelerator(config)
    trainer = _Trainer(model, folder, config, accelerator)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serving(model, folder)) as app:
        trainer.meet(portal, GeneratorClient([URL], None, transport=httpx.ASGITransport(app)))
        before, batch = trainer.mismatch(trainer.rollouts())
        moved, after = [], []
        for step in (1, 2):
            trainer.update(batch, step)
            moved.append(trainer.mismatch(batch)[0])
            mismatch, batch = trainer.mismatch(trainer.rollouts())
            after.append(mismatch)
    alerts = trainer.alerts
    return Outcome("alerted" if alerts else "trained", "".join(alerts[:1]), before, max(after), min(moved))


@asynccontextmanager
async def serving(model: Path, folder: Path) -> AsyncIterator[Any]:
    """Serve a vLLM engine with the same app as the plug-in."""
    options = parse(_arguments(model, folder))
    args = parse_engine_args(options.settings, options.engine_args)
    with start_errors(str(model)):
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = (
            "fork"  # this process has already imported what the engine's process needs
        )
        client = AsyncLLM.from_vllm_config(config)
    engine = VllmEngine()
    engine.attach(client, devices(1), takes_seeds=takes_seeds(), trust_remote_code=False)
    switcher = WeightSwitcher(engine, WeightStore(options.settings.shared.weights_dir), options.settings.generator)
    await switcher.start()
    try:
        yield build_app(switcher, str(model))
    finally:
        await switcher.close()  # the engine's process ends with this process group


def _arguments(model: Path, folder: Path) -> list[str]:
    values = {
        "engine": "vllm", "model": model, "weights-dir": folder / "weights", "dtype": "float32",
        "max-model-len": MAX_MODEL_LEN, "block-size": 32, "max-num-seqs": 16, "max-num-batched-tokens": 2048,
        "num-gpu-blocks-override": 64,
    }  # fmt: skip
    return ["--enforce-eager", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def _config(folder: Path) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {
            "max_steps": 2,
            "output_dir": folder / "runs",
            "rewards": [{"function": "rewards:odd"}],
            "rollout": {"num_generations": 4, "max_completion_length": 16, "temperature": 0.7},
            "optim": {"learning_rate": 0.001, "max_grad_norm": 100.0},
            "learner": {"max_tokens_per_micro_batch": 100},
        }
    )


class _Trainer:
    """The parts of a run from the handshake to the second step."""

    def __init__(self, model: Path, folder: Path, config: TrainerConfig, accelerator: Accelerator) -> None:
        self._config, self._accelerator = config, accelerator
        self.alerts: list[str] = []
        self._store = WeightStore(folder / "weights")
        self._shared = SharedConfig(model=str(model), weights_dir=folder / "weights")
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.learner = Learner(self._shared, config, tokenizer, accelerator, needs_reference=False)
        self.learner.rehearse()
        self.fingerprint = fingerprint_of(self.learner.model, model)
        self._grpo = Grpo(config)

    def meet(self, portal: BlockingPortal, client: GeneratorClient) -> None:
        self._portal, self._client = portal, client
        infos = portal.call(client.info, 30.0)
        self._longest = self.learner.fix_positions([info.max_model_len for info in infos.values()])
        check_generators(
            list(infos.values()), list(infos), ours=self.fingerprint, model=self._shared.model,
            max_completion_length=self._config.rollout.max_completion_length, accelerators=[],
        )  # fmt: skip
        self.learner.mismatch_check = MismatchCheck(self._config, [info.dtype for info in infos.values()])

    def rollouts(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
        assert max(PROMPT_LENGTHS) + self._config.rollout.max_completion_length <= self._longest
        request = RolloutRequest(
            prompts=tuple(Prompt(token_ids=tuple(p)) for p in prompts),
            sampling=sampling(self._config.rollout).model_copy(update={"ignore_eos": True}),
        )
        groups: list[Group] = []

        async def ask() -> None:
            await self._client.rollouts(request, groups.append, timeout_s=60.0)

        self._portal.call(ask)
        return self._grpo.make_batch(
            [scored(prompts[group.prompt_index], group.completions, range(len(group.completions))) for group in groups]
        )

    @torch.no_grad()
    def mismatch(self, batch: Batch) -> tuple[float, Batch]:
        logprobs_BT, _ = self.learner._policy(*batch.model_inputs)
        return float((logprobs_BT - batch.sampler_logprobs_BT).abs().max()), batch

    def update(self, batch: Batch, step: int) -> None:
        """Check the mismatch, update the policy and publish it."""
        self.learner.update(batch, self._grpo)
        check = self.learner.mismatch_check
        if check and (check.excess or 0) > AlertsConfig.model_fields["mismatch"].default:
            self.alerts.append(check.description)
        with self._store.writer("the matrix"):
            Publisher(
                store=self._store, client=self._client, portal=self._portal,
                wait=lambda task: task.result(),  # type: ignore[union-attr]  # this rank has a task
                config=self._config.publish, run_name="matrix", attempt=1, model_fingerprint=self.fingerprint,
                dtype=torch.float32, accelerator=self._accelerator,
            )(self.learner.model, step)  # fmt: skip
