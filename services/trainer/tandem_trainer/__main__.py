"""`python -m tandem_trainer --config PROJECT/config.yaml`, also under `accelerate launch -m`."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from anyio.from_thread import BlockingPortal, start_blocking_portal
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tandem_protocol.config import ConfigError, SharedConfig, format_resolved, load, parse_overrides, read_token
from tandem_protocol.errors import StoreLocked, TandemError, Unauthorized
from tandem_protocol.fingerprint import differences
from tandem_protocol.messages import ModelFingerprint
from tandem_protocol.store import WeightStore

from . import algorithms, trackers
from .algorithms.base import Algorithm
from .client import GeneratorClient
from .config import Settings, TrainerConfig
from .devices import all_accelerators, make_accelerator
from .errors import UserError
from .evaluate import Evaluation
from .exporter import exported
from .handshake import check_generators
from .judge import Judge, WinRate
from .learner import Learner
from .loop import train
from .lora import adapted_head
from .model_files import model_dir
from .prompts import PromptCursor, PromptRow, check_lengths, load_prompts
from .publish import Publisher, fingerprint_of
from .rewards import Rewards
from .rollouts import Rollouts
from .run import Run
from .shards import model_shapes

INFO_TIMEOUT_S = 30.0
INTERRUPTED = 130
"""Exit status after Ctrl-C before the first step, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done or stopped with a checkpoint, 2 for a user's mistake, 1 for any other failure."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    try:
        path, check, overrides = parse(sys.argv[1:] if argv is None else argv)
        settings, sources = load(Settings, path=path, overrides=overrides)
        if check:
            print(format_resolved(settings, sources))
            return 0
        # Everything relative in the configuration starts at the project, the reward functions' module included.
        os.chdir(path.parent)
        sys.path.insert(0, str(Path.cwd()))
        run_trainer(settings, format_resolved(settings, sources))
    except (ConfigError, UserError, StoreLocked, Unauthorized) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except (TandemError, FloatingPointError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str]) -> tuple[Path, bool, dict[str, Any]]:
    """`--config`, `--check`, and dotted overrides (`--trainer.max_steps 5` or `--trainer.max_steps=5`, values as YAML).

    Raises:
        ConfigError: an argument is none of these, or an override has no value.
    """
    parser = argparse.ArgumentParser(prog="tandem_trainer", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the project's YAML file")
    parser.add_argument("--check", action="store_true", help="print every setting with where it came from, and exit")
    known, rest = parser.parse_known_args(argv)
    return known.config.absolute(), known.check, parse_overrides(rest)


def run_trainer(settings: Settings, resolved: str) -> None:
    """Take the store and the background thread for the length of the run, then train."""
    accelerator = make_accelerator(settings.trainer)
    accelerators = all_accelerators(accelerator)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    set_seed(settings.trainer.seed)
    store = WeightStore(settings.shared.weights_dir)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            holder = f"run {settings.trainer.run_name}, pid {os.getpid()} on {socket.gethostname()}"
            stack.enter_context(store.writer(holder))
        accelerator.wait_for_everyone()
        run = Run(settings.trainer, accelerator, store)
        (run.dir / "config.resolved").write_text(f"{resolved}\n")
        if settings.trainer.metrics_port and accelerator.is_main_process:
            stack.enter_context(exported(run.dir, settings.trainer.metrics_port, read_token()))
        portal = stack.enter_context(start_blocking_portal())
        client = GeneratorClient(
            settings.shared.generators,
            read_token(),
            stall_timeout_s=settings.trainer.rollout.stall_timeout_s,
            rank=accelerator.process_index,
        )
        stack.callback(portal.call, client.close)
        project = load_project(settings, accelerator, run)
        if isinstance(project.scorer, Rewards):
            stack.callback(portal.call, project.scorer.close)
        with run.timer("wait_for_generators"):
            attempts = meet_generators(settings, client, portal, project, accelerators)
        run.identify(identity(settings, accelerator, project), attempts)
        trackers.start(accelerator, settings.trainer)
        stack.callback(trackers.finish, accelerator)
        run.stop_on_signals()
        step = construct_and_train(settings.trainer, accelerator, run, store, client, portal, project)
    if accelerator.is_main_process and step < settings.trainer.max_steps:
        print(f"stopped at step {step}, resume by running the same command", flush=True)
    # Or gloo's threads, which nobody has ended, may abort a process that has done its work.
    accelerator.state.destroy_process_group()


class Project(NamedTuple):
    """What the user brings, loaded and checked."""

    scorer: Rewards | Judge
    rows: list[PromptRow]
    eval_rows: list[PromptRow]
    algorithm: Algorithm
    learner: Learner
    fingerprint: ModelFingerprint


def load_project(settings: Settings, accelerator: Accelerator, run: Run) -> Project:
    """Load everything that can be wrong with the project, before the generators are waited for."""
    shared, config = settings.shared, settings.trainer
    if config.rollout.num_prompts % accelerator.num_processes:
        raise UserError(
            f"rollout.num_prompts is {config.rollout.num_prompts} for {accelerator.num_processes} trainer processes; "
            "wanted a multiple of their number"
        )
    with run.timer("start"):
        tokenizer = load_tokenizer(shared)
        scorer = load_scorer(config, tokenizer)
        rows = load_prompts(config.prompts, tokenizer)
        eval_rows = load_prompts(config.eval.prompts, tokenizer) if config.eval else []
        algorithm = algorithms.build(config)
        learner = Learner(shared, config, tokenizer, accelerator, needs_reference=algorithm.needs_reference)
        learner.rehearse()
        ours = fingerprint_of(learner.model, model_dir(shared.model, shared.revision))
    return Project(scorer, rows, eval_rows, algorithm, learner, ours)


def identity(settings: Settings, accelerator: Accelerator, project: Project) -> dict[str, Any]:
    """What must not change between a run's checkpoint and its resumption."""
    return {
        "shared.model": settings.shared.model,
        "shared.revision": settings.shared.revision,
        "the model's fingerprint": project.fingerprint.model_dump(),
        "the number of trainer processes": accelerator.num_processes,
        "the number of prompts": len(project.rows),
        "trainer.lora": settings.trainer.lora and settings.trainer.lora.model_dump(mode="json"),
        "trainer.rollout.num_prompts": settings.trainer.rollout.num_prompts,
        "trainer.rollout.num_generations": settings.trainer.rollout.num_generations,
    }


def meet_generators(
    settings: Settings,
    client: GeneratorClient,
    portal: BlockingPortal,
    project: Project,
    accelerators: Sequence[str],
) -> list[int]:
    """Wait until the generators are ready and see that they fit the project; returns the attempts that they serve."""
    completion = settings.trainer.rollout.max_completion_length
    portal.call(client.wait_ready, settings.trainer.start_timeout_s)
    infos = portal.call(client.info, INFO_TIMEOUT_S)
    tables = {
        url: portal.call(client.parameters, url, INFO_TIMEOUT_S)
        for url, info in infos.items()
        if "parameters" in differences(project.fingerprint, info.fingerprint)
    }
    length = check_generators(
        list(infos.values()),
        list(infos),
        ours=project.fingerprint,
        model=settings.shared.model,
        max_completion_length=completion,
        accelerators=accelerators,
        shapes=model_shapes(project.learner.model),
        tables=tables,
        lora=settings.trainer.lora,
        adapted_head=adapted_head(project.learner.model),
    )
    check_lengths([*project.rows, *project.eval_rows], length, completion)
    return [info.version.attempt for info in infos.values()]


def construct_and_train(
    config: TrainerConfig,
    accelerator: Accelerator,
    run: Run,
    store: WeightStore,
    client: GeneratorClient,
    portal: BlockingPortal,
    project: Project,
) -> int:
    """Make the parts of the loop and run it; returns the last step."""
    cursor = PromptCursor(
        len(project.rows),
        seed=config.seed,
        shuffle=config.prompts.shuffle,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    rollouts = Rollouts(
        rows=project.rows,
        cursor=cursor,
        client=client,
        rewards=project.scorer,
        portal=portal,
        wait=run.wait,
        config=config.rollout,
        prompts_a_step=config.rollout.num_prompts // accelerator.num_processes,
        max_lag=config.max_lag,
    )
    publish = Publisher(
        store=store,
        client=client,
        portal=portal,
        wait=run.wait,
        config=config.publish,
        run_name=config.run_name,
        attempt=run.attempt,
        model_fingerprint=project.fingerprint,
        dtype=getattr(torch, config.learner.dtype),
        accelerator=accelerator,
    )
    win_rate = None
    if isinstance(project.scorer, Judge):
        win_rate = WinRate(project.scorer, project.eval_rows, run.dir / "eval_first.json")
    evaluate = Evaluation(
        rows=project.eval_rows,
        client=client,
        rewards=project.scorer,
        win_rate=win_rate,
        portal=portal,
        config=config,
        file=run.dir / "eval.jsonl",
        is_main=accelerator.is_main_process,
    )
    try:
        return train(config, run, rollouts, project.learner, project.algorithm, publish, evaluate)
    finally:
        rollouts.close()


def load_scorer(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> Rewards | Judge:
    """What says which completions are better.

    Raises:
        UserError: one of the project's functions does not exist or cannot be imported.
    """
    drop_errors, timeout_s = config.reward_errors == "drop", config.reward_timeout_s
    if judge := config.online_dpo.judge:
        return Judge(judge, tokenizer, drop_errors=drop_errors, timeout_s=timeout_s)
    return Rewards(config.rewards, tokenizer, drop_errors=drop_errors, timeout_s=timeout_s)


def load_tokenizer(shared: SharedConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(
            shared.model, revision=shared.revision, trust_remote_code=shared.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of shared.model {shared.model!r} cannot be loaded: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
