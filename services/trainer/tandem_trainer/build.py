"""Build everything that `loop.py` uses: load and check the user's project, then construct the parts of the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from anyio.from_thread import BlockingPortal
from transformers import PreTrainedConfig

from tandem_protocol.config.trainer import TrainerConfig, TrainerSettings
from tandem_protocol.messages import ModelFingerprint, SwitchMode
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient
from tandem_rollout.completions import CompletionReader
from tandem_rollout.episode_sampler import EpisodeSampler
from tandem_rollout.episodes import Episodes
from tandem_rollout.errors import UserError
from tandem_rollout.pool import Slot
from tandem_rollout.project import load_inputs
from tandem_rollout.prompts import PromptCursor, PromptRow
from tandem_rollout.queue import Rollouts
from tandem_rollout.rewards.judge import Judge, WinRate
from tandem_rollout.rewards.scoring import Rewards
from tandem_rollout.sampler import Sampler

from . import algorithms
from .algorithms.base import Algorithm
from .evaluate import Evaluation
from .learner.learner import Learner
from .learner.model_files import model_dir
from .loop import train
from .publish import Publisher, fingerprint_of
from .run.run import Run
from .run.token_log import TokenTexts


class LoadedProject(NamedTuple):
    """The user's rewards, prompts and model, loaded and checked."""

    scorer: Rewards | Judge
    reader: CompletionReader
    rows: list[PromptRow]
    eval_rows: list[PromptRow]
    episodes: Episodes | None
    algorithm: Algorithm
    learner: Learner
    fingerprint: ModelFingerprint


def load_project(
    settings: TrainerSettings, accelerator: Accelerator, run: Run, portal: BlockingPortal
) -> LoadedProject:
    """Load and check the project before waiting for the generators, so that its errors appear early.

    Environments live in the event loop of `portal`.

    Raises:
        UserError: the prompts, rewards, model or configuration do not fit together.
    """
    shared, config = settings.shared, settings.trainer
    with run.timer("start"):
        inputs = load_inputs(settings, accelerator.num_processes, portal.call, rank=accelerator.process_index)
        run.token_texts = TokenTexts(inputs.tokenizer)
        algorithm = algorithms.load(config, accelerator.device)
        learner = Learner(shared, config, inputs.tokenizer, accelerator, needs_reference=algorithm.needs_reference)
        check_stop_tokens(config.rollout.stop_token_ids, learner.model.config)
        learner.rehearse(resumes=run.resumes)
        ours = fingerprint_of(learner.model, model_dir(shared.model, shared.revision))
    run.journal.progress(inputs.describe(settings))
    if learner.unshared_because:
        run.journal.progress(f"The prompt of each completion is computed again: {learner.unshared_because}.")
    reader = CompletionReader(inputs.tokenizer)
    return LoadedProject(
        inputs.scorer, reader, inputs.rows, inputs.eval_rows, inputs.episodes, algorithm, learner, ours
    )


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


class Session(NamedTuple):
    """One start of the trainer on a project, with generators that fit it."""

    config: TrainerConfig
    accelerator: Accelerator
    run: Run
    store: WeightStore
    client: GeneratorClient
    portal: BlockingPortal
    project: LoadedProject


AnySampler = Sampler | EpisodeSampler


def construct_and_train(session: Session, training: AnySampler, evaluating: AnySampler) -> int:
    """Construct the parts of the loop, run it, and return the last step. The run measures the time of each phase.

    Args:
        training: samples the groups to train on.
        evaluating: samples those of evaluations.
    """
    config, run, project = session.config, session.run, session.project
    publisher = _publisher(session)
    rollouts, evaluation = _rollouts(session, training, publisher), _evaluation(session, evaluating)

    @run.timer("publish")
    def publish(step: int) -> Version:
        is_awaited = config.max_lag == 0 or step == config.max_steps or evaluation.due(step)
        return publisher(project.learner.model, step, behind=not is_awaited)

    evaluate_now = run.timer("evaluate")(evaluation)

    try:
        return train(
            config,
            run,
            rollouts,
            project.learner,
            project.algorithm,
            sample=run.timer("wait_for_rollouts")(rollouts.next),
            update=run.timer("update")(project.learner.update),
            publish=publish,
            published=run.timer("publish")(publisher.wait),
            evaluate=lambda step, version: evaluate_now(version) if evaluation.due(step) else None,
        )
    finally:
        rollouts.close()
        publisher.close()


@contextmanager
def samplers(session: Session, max_model_len: int) -> Iterator[tuple[AnySampler, AnySampler]]:
    """Yield what samples trajectories for training and for evaluations.

    Args:
        max_model_len: longest context, in tokens.
    """
    config, project = session.config, session.project
    if project.episodes is None:
        single = Sampler(session.client, project.reader, project.scorer)
        yield single, single
        return
    prompts = (config.prompts, config.eval.prompts if config.eval else config.prompts)
    playing = project.episodes.playing(*prompts, max_model_len=max_model_len)
    with session.portal.wrap_async_context_manager(playing) as plays:
        training, evaluating = (EpisodeSampler(session.client, play, project.scorer) for play in plays)
        yield training, evaluating


def _rollouts(session: Session, sampler: AnySampler, publisher: Publisher) -> Rollouts:
    config, processes = session.config, session.accelerator.num_processes

    def wait(task: Future[list[Slot]]) -> object:
        return session.run.wait(task, behind=publisher.in_flight)

    rows = session.project.rows
    cursor = PromptCursor(
        len(rows),
        seed=config.seed,
        shuffle=config.prompts.shuffle,
        rank=session.accelerator.process_index,
        world_size=processes,
    )
    return Rollouts(
        rows=rows,
        cursor=cursor,
        sampler=sampler,
        portal=session.portal,
        wait=wait,
        config=config.rollout,
        prompts_per_step=config.rollout.num_prompts // processes,
        max_lag=config.max_lag,
        switches_abort=config.publish.mode is SwitchMode.ABORT,
        # Twice: a version is written by all processes, and then loaded by all generators.
        until_served=partial(session.client.until_served, timeout_s=2 * config.publish.timeout_s),
    )


def _publisher(session: Session) -> Publisher:
    config = session.config
    return Publisher(
        store=session.store,
        client=session.client,
        portal=session.portal,
        wait=session.run.wait,
        config=config.publish,
        run_name=config.run_name,
        attempt=session.run.attempt,
        model_fingerprint=session.project.fingerprint,
        dtype=getattr(torch, config.learner.dtype),
        accelerator=session.accelerator,
        report=session.run.published,
    )


def _evaluation(session: Session, sampler: AnySampler) -> Evaluation:
    project, run = session.project, session.run
    win_rate = None
    if isinstance(project.scorer, Judge):
        win_rate = WinRate(project.scorer, project.eval_rows, run.dir / "eval_first.json")
    return Evaluation(
        rows=project.eval_rows,
        sampler=sampler,
        win_rate=win_rate,
        portal=session.portal,
        wait=run.wait,
        config=session.config,
        write=run.journal.evaluation,
        is_main=session.accelerator.is_main_process,
    )
