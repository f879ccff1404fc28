"""Build everything that `loop.py` uses: load and check the user's project, then construct the parts of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from anyio.from_thread import BlockingPortal
from transformers import PreTrainedConfig

from tandem_protocol.config.trainer import TrainerConfig, TrainerSettings
from tandem_protocol.messages import ModelFingerprint
from tandem_protocol.store import WeightStore
from tandem_rollout.client import GeneratorClient
from tandem_rollout.errors import UserError
from tandem_rollout.project import load_inputs
from tandem_rollout.prompts import PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.rewards.judge import Judge, WinRate
from tandem_rollout.rewards.scoring import Rewards

from . import algorithms
from .algorithms.base import Algorithm
from .evaluate import Evaluation
from .learner.learner import Learner
from .learner.model_files import model_dir
from .loop import train
from .publish import Publisher, fingerprint_of
from .run.run import Run


class LoadedProject(NamedTuple):
    """The user's rewards, prompts and model, loaded and checked."""

    scorer: Rewards | Judge
    rows: list[PromptRow]
    eval_rows: list[PromptRow]
    algorithm: Algorithm
    learner: Learner
    fingerprint: ModelFingerprint


def load_project(settings: TrainerSettings, accelerator: Accelerator, run: Run) -> LoadedProject:
    """Load and check the project before waiting for the generators, so that its errors appear early.

    Raises:
        UserError: the prompts, rewards, model or configuration do not fit together.
    """
    shared, config = settings.shared, settings.trainer
    with run.timer("start"):
        inputs = load_inputs(settings, accelerator.num_processes)
        algorithm = algorithms.build(config)
        learner = Learner(shared, config, inputs.tokenizer, accelerator, needs_reference=algorithm.needs_reference)
        check_stop_tokens(config.rollout.stop_token_ids, learner.model.config)
        learner.rehearse()
        ours = fingerprint_of(learner.model, model_dir(shared.model, shared.revision))
    run.journal.progress(inputs.describe(settings))
    return LoadedProject(inputs.scorer, inputs.rows, inputs.eval_rows, algorithm, learner, ours)


def check_stop_tokens(stop_token_ids: Sequence[int], model_config: PreTrainedConfig) -> None:
    """Check that the model's vocabulary contains the stop tokens. Otherwise every generator would refuse them later.

    Raises:
        UserError: a stop token is not in the vocabulary; names it, and the size of the vocabulary.
    """
    size = model_config.get_text_config().vocab_size
    if unknown := [token for token in stop_token_ids if token >= size]:
        raise UserError(
            f"trainer.rollout.stop_token_ids contains {unknown}, expected ids below the size of the vocabulary, {size}"
        )


def construct_and_train(
    config: TrainerConfig,
    accelerator: Accelerator,
    run: Run,
    store: WeightStore,
    client: GeneratorClient,
    portal: BlockingPortal,
    project: LoadedProject,
) -> int:
    """Construct the parts of the loop, run it, and return the last step."""
    rollouts = Rollouts(
        rows=project.rows,
        cursor=_prompt_cursor(config, accelerator, len(project.rows)),
        client=client,
        rewards=project.scorer,
        portal=portal,
        wait=run.wait,
        config=config.rollout,
        prompts_per_step=config.rollout.num_prompts // accelerator.num_processes,
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
    evaluate = Evaluation(
        rows=project.eval_rows,
        client=client,
        rewards=project.scorer,
        win_rate=_win_rate(project, run),
        portal=portal,
        wait=run.wait,
        config=config,
        file=run.dir / "eval.jsonl",
        is_main=accelerator.is_main_process,
    )
    try:
        return train(config, run, rollouts, project.learner, project.algorithm, publish, evaluate)
    finally:
        rollouts.close()


def _prompt_cursor(config: TrainerConfig, accelerator: Accelerator, num_rows: int) -> PromptCursor:
    return PromptCursor(
        num_rows,
        seed=config.seed,
        shuffle=config.prompts.shuffle,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def _win_rate(project: LoadedProject, run: Run) -> WinRate | None:
    if not isinstance(project.scorer, Judge):
        return None
    return WinRate(project.scorer, project.eval_rows, run.dir / "eval_first.json")
