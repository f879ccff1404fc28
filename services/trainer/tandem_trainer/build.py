"""Build everything that `loop.py` uses: load and check the user's project, then construct the parts of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from anyio.from_thread import BlockingPortal
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from tandem_protocol.config import SharedConfig
from tandem_protocol.messages import ModelFingerprint
from tandem_protocol.model_directory import check_model_directory
from tandem_protocol.problems import one_line
from tandem_protocol.store import WeightStore

from . import algorithms
from .algorithms.base import Algorithm
from .client import GeneratorClient
from .config import Settings, TrainerConfig
from .errors import UserError
from .evaluate import Evaluation
from .judge import Judge, WinRate
from .learner import Learner
from .loop import train
from .model_files import model_dir
from .positions import longest
from .prompts import PromptCursor, PromptRow, check_lengths, load_prompts
from .publish import Publisher, fingerprint_of
from .rewards import Rewards
from .rollouts import Rollouts
from .run import Run


class LoadedProject(NamedTuple):
    """The user's rewards, prompts and model, loaded and checked."""

    scorer: Rewards | Judge
    rows: list[PromptRow]
    eval_rows: list[PromptRow]
    algorithm: Algorithm
    learner: Learner
    fingerprint: ModelFingerprint


class Inputs(NamedTuple):
    """What the user brings besides the model's weights, loaded and checked."""

    tokenizer: PreTrainedTokenizerBase
    scorer: Rewards | Judge
    rows: list[PromptRow]
    eval_rows: list[PromptRow]
    algorithm: Algorithm

    def describe(self, settings: Settings) -> str:
        """One line about what will be trained, for the log."""
        config = settings.trainer
        evaluation = f", evaluated on {len(self.eval_rows)} prompts" if self.eval_rows else ""
        return (
            f"training {settings.shared.model} on {len(self.rows)} prompts of {config.prompts.source}, scored by "
            f"{', '.join(config.scorers)}{evaluation}"
        )


def load_inputs(settings: Settings, processes: int) -> Inputs:
    """Load the tokenizer, the rewards and the prompts. This takes seconds, and needs no device and no generator.

    Raises:
        ConfigError: the number of processes does not divide that of the prompts.
        UserError: the prompts, rewards or configuration do not fit together.
    """
    config = settings.trainer
    config.check_processes(processes)
    tokenizer = load_tokenizer(settings.shared)
    scorer = load_scorer(config, tokenizer)
    rows = load_prompts(config.prompts, tokenizer)
    eval_rows = load_prompts(config.eval.prompts, tokenizer) if config.eval else []
    scorer.check_parameters([*rows, *eval_rows])
    if length := _longest(settings.shared):
        check_lengths([*rows, *eval_rows], length, config.rollout.max_completion_length)
    return Inputs(tokenizer, scorer, rows, eval_rows, algorithms.build(config))


def _longest(shared: SharedConfig) -> int | None:
    """The model's own limit of prompt and completion. The generators may have a smaller one."""
    try:
        config = AutoConfig.from_pretrained(
            shared.model, revision=shared.revision, trust_remote_code=shared.trust_remote_code
        )
    except (OSError, ValueError):  # loading the model reports it
        return None
    return longest(config)


def load_project(settings: Settings, accelerator: Accelerator, run: Run) -> LoadedProject:
    """Load and check the project before waiting for the generators, so that its errors appear early.

    Raises:
        UserError: the prompts, rewards, model or configuration do not fit together.
    """
    shared, config = settings.shared, settings.trainer
    with run.timer("start"):
        inputs = load_inputs(settings, accelerator.num_processes)
        needs_reference = inputs.algorithm.needs_reference
        learner = Learner(shared, config, inputs.tokenizer, accelerator, needs_reference=needs_reference)
        check_stop_tokens(config.rollout.stop_token_ids, learner.model.config)
        learner.rehearse(resumes=run.resumes)
        ours = fingerprint_of(learner.model, model_dir(shared.model, shared.revision))
    run.journal.progress(inputs.describe(settings))
    return LoadedProject(inputs.scorer, inputs.rows, inputs.eval_rows, inputs.algorithm, learner, ours)


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
        write=run.journal.evaluation,
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


def load_scorer(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> Rewards | Judge:
    """Load the reward functions, or the judge if `online_dpo.judge` is set.

    Raises:
        UserError: one of the project's functions does not exist or cannot be imported.
    """
    drop_errors = config.reward_errors == "drop"
    timeout_s = config.reward_timeout_s
    if judge := config.online_dpo.judge:
        return Judge(judge, tokenizer, drop_errors=drop_errors, timeout_s=timeout_s)
    return Rewards(config.rewards, tokenizer, drop_errors=drop_errors, timeout_s=timeout_s)


def load_tokenizer(shared: SharedConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        UserError: the model does not exist, or its tokenizer cannot be loaded.
    """
    check_model_directory(shared.model)
    try:
        return AutoTokenizer.from_pretrained(
            shared.model, revision=shared.revision, trust_remote_code=shared.trust_remote_code
        )
    except Exception as error:  # any kind: a damaged tokenizer.json fails deep inside the libraries
        raise UserError(
            f"the tokenizer of shared.model {shared.model!r} cannot be loaded: {one_line(error)}. Expected the "
            "tokenizer files of a Hugging Face model. Fix: restore these files, or choose another model."
        ) from error
