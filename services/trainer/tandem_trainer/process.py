"""One trainer process: takes the run's folder and the weight store, meets the generators, and trains."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from anyio.from_thread import BlockingPortal, start_blocking_portal
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from tandem_protocol import logs
from tandem_protocol.config import ConfigError, read_token
from tandem_protocol.config.trainer import TrainerSettings
from tandem_protocol.errors import StoreLocked, TandemError, Unauthorized
from tandem_protocol.fingerprint import differences
from tandem_protocol.folders import permission_problem, require_writable
from tandem_protocol.lock import Held, exclusive
from tandem_protocol.messages import Info
from tandem_protocol.once import first_to_say, warn_once
from tandem_protocol.printed import capture_output
from tandem_protocol.run_state import LOCK_FILE
from tandem_protocol.store import WeightStore
from tandem_rollout.client import GeneratorClient
from tandem_rollout.errors import ImportFailed, UserError
from tandem_rollout.handshake import check_generators
from tandem_rollout.project import check_fit, load_inputs
from tandem_rollout.rewards.scoring import Rewards

from . import algorithms
from .build import LoadedProject, Session, construct_and_train, load_project, samplers
from .devices import all_accelerators, make_accelerator
from .learner.lora import adapted_head
from .learner.mismatch import MismatchCheck
from .learner.shards import model_shapes
from .ranks import FailedTogether, has_lost_peer, own_errors
from .run import resume, trackers
from .run.checkpoint import CheckpointFailed
from .run.exporter import exported
from .run.run import Run
from .run.stopping import raise_terminated
from .supervise import newest_checkpoint
from .volumes import check_size, wait_until_writable

log = logging.getLogger(__name__)

INFO_TIMEOUT_S = 30.0
SWITCH_INTERVAL_S = 50e-6
"""How long the learner waits for the interpreter while the rollout side computes in another thread. With Python's 5 ms,
an update was 6 % slower beside 256 episodes (ADR 6)."""
NOT_HERE = (AssertionError, OSError, RuntimeError)
"""What a project's module raises if it needs a GPU or a network at import, which the place of the check may lack."""


def train(settings: TrainerSettings, resolved: str, project: Path) -> int:
    """Run the trainer in the project's folder, and report errors in one line.

    Args:
        resolved: every setting with its source, for the run's folder.

    Returns:
        The exit status: 0 if the run is finished, 2 for a user's mistake, 1 for any other failure, 143 or 130 if
        SIGTERM or SIGINT stopped it with a checkpoint.
    """
    _configure_libraries()
    capture_output()
    # Relative paths of the configuration start at the project, and so does the import of the reward functions.
    os.chdir(project)
    sys.path.insert(0, str(Path.cwd()))
    try:
        with own_errors():
            return run_trainer(settings, resolved)
    except (ConfigError, UserError, StoreLocked, Unauthorized) as error:
        _report(error)
        return 2
    except PermissionError as error:
        logs.report_error(permission_problem(error))
        return 2
    except (TandemError, CheckpointFailed, FloatingPointError, OSError, SafetensorError) as error:
        _report(error)
        return 1
    except FailedTogether:  # the other process says why
        return 1
    except RuntimeError as error:
        if not has_lost_peer(error):
            raise
        warn_once(log, "another trainer process has ended, so this one ends too")
        log.debug("the collective operation failed", exc_info=True)
        return 1


def _configure_libraries() -> None:
    transformers_logging.disable_progress_bar()
    logs.adopt("torch", "transformers", "huggingface_hub")


def _report(error: Exception) -> None:
    if first_to_say(str(error)):
        logs.report_error(error)


def check_project(settings: TrainerSettings, project: Path) -> int:
    """Check what can be checked in seconds: the prompts, the rewards, the loss, and that the model's files are there.

    Returns:
        The exit status: 2 for a user's mistake, else 0, also if the functions can only be imported elsewhere.
    """
    _configure_libraries()
    capture_output()
    os.chdir(project)
    sys.path.insert(0, str(Path.cwd()))
    processes = os.environ.get("TANDEM_TRAINER_PROCESSES") or "1"
    settings = _without_servers(settings)
    try:
        with start_blocking_portal() as portal:
            inputs = load_inputs(settings, int(processes) if processes.isdecimal() else 1, portal.call)
            if inputs.episodes:
                portal.call(inputs.episodes.close)
        algorithms.load(settings.trainer, torch.device("cpu"))
    except (ConfigError, UserError) as error:
        if isinstance(error, ImportFailed) and isinstance(error.__cause__, NOT_HERE):
            log.warning("the project cannot be checked here: %s", error)
            return 0
        logs.report_error(error)
        return 2
    log.info("the project is complete: %s", inputs.describe(settings))
    return 0


def _without_servers(settings: TrainerSettings) -> TrainerSettings:
    """Check the environments in this process: their servers may not run yet."""
    trainer = settings.trainer
    rollout = trainer.rollout.model_copy(update={"environment_urls": ()})
    return settings.model_copy(update={"trainer": trainer.model_copy(update={"rollout": rollout})})


def run_trainer(settings: TrainerSettings, resolved: str) -> int:
    """Lock the run's folder and the weight store for the length of the run, and train. Returns the exit status."""
    run_dir = settings.trainer.run_dir
    wait_until_writable(run_dir, "trainer.output_dir", resumes=newest_checkpoint(run_dir) >= 0)
    require_writable(settings.shared.weights_dir, "shared.weights_dir")
    accelerator = make_accelerator(settings.trainer)
    accelerators = all_accelerators(accelerator)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    set_seed(settings.trainer.seed)
    store = WeightStore(settings.shared.weights_dir)
    holder = f"run {settings.trainer.run_name}, pid {os.getpid()} on {socket.gethostname()}"
    with ExitStack() as stack:
        if accelerator.is_main_process:
            hold_run_dir(stack, settings.trainer.run_dir, holder)
        accelerator.wait_for_everyone()
        run = Run(settings.trainer, accelerator, store)
        if run.finished:
            if accelerator.is_main_process:
                log.info("%s", run.finished)
            status = 0
        else:
            if accelerator.is_main_process:
                stack.enter_context(store.writer(holder))
                check_size(settings.shared.weights_dir)
            status = train_run(settings, resolved, accelerator, accelerators, store, run, stack)
    # Without this, gloo's running threads may abort a process whose work is done.
    accelerator.state.destroy_process_group()
    return status


def hold_run_dir(stack: ExitStack, run_dir: Path, holder: str) -> None:
    """Keep other trainers out of the run's folder while `stack` is open.

    Raises:
        UserError: another trainer uses it.
    """
    try:
        stack.enter_context(exclusive(run_dir / LOCK_FILE, holder))
    except Held as error:
        raise UserError(
            f"{run_dir} is in use by {error}; {holder} cannot use it too. Wait for that trainer or stop it, or choose "
            "another trainer.run_name."
        ) from error


def train_run(
    settings: TrainerSettings,
    resolved: str,
    accelerator: Accelerator,
    accelerators: Sequence[str],
    store: WeightStore,
    run: Run,
    stack: ExitStack,
) -> int:
    """Load the project, meet the generators and train, in the folder and the store that this process has locked.

    Returns:
        The exit status.
    """
    stack.enter_context(run.record_outcome())
    stack.enter_context(run.journal.listening(lambda: run.step))
    signal.signal(signal.SIGTERM, raise_terminated)
    if settings.trainer.metrics_port and accelerator.is_main_process:
        bounds = {"max_lag": settings.trainer.max_lag}
        stack.enter_context(exported(run.dir, settings.trainer.metrics_port, read_token(), bounds))
    portal = stack.enter_context(start_blocking_portal())
    client = GeneratorClient(
        settings.shared.generators,
        read_token(),
        stall_timeout_s=settings.trainer.rollout.stall_timeout_s,
        rank=accelerator.process_index,
        reports=accelerator.is_local_main_process,
    )
    stack.callback(portal.call, client.close)
    run.loads = lambda: portal.call(client.dispatch.loads)
    project = load_project(settings, accelerator, run, portal)
    if isinstance(project.scorer, Rewards):
        stack.callback(portal.call, project.scorer.close)
    if project.episodes:
        stack.callback(portal.call, project.episodes.close)
    with run.timer("wait_for_generators"):
        infos, max_model_len = meet_generators(settings, client, portal, project, accelerators)
    check = MismatchCheck(settings.trainer, [info.dtype for info in infos])
    project.learner.mismatch_check = run.mismatch_check = check
    facts = resume.describe(
        settings,
        processes=accelerator.num_processes,
        fingerprint=project.fingerprint.model_dump(),
        rows=project.rows,
        eval_rows=project.eval_rows,
    )
    run.identify(facts, [info.version.attempt for info in infos])
    if accelerator.is_main_process:
        run.journal.settings(resolved)
    trackers.start(accelerator, settings.trainer)
    stack.callback(trackers.finish, accelerator)
    run.stop_on_signals()
    session = Session(settings.trainer, accelerator, run, store, client, portal, project)
    with samplers(session, max_model_len) as (training, evaluating):
        step = construct_and_train(session, training, evaluating)
    if accelerator.is_main_process and run.is_done:
        log.info("done: the run is finished at step %d; results in %s", step, run.dir.absolute())
    elif accelerator.is_main_process:
        log.info("stopped at step %d with a checkpoint. The same command resumes the run.", step)
    return run.exit_status


def meet_generators(
    settings: TrainerSettings,
    client: GeneratorClient,
    portal: BlockingPortal,
    project: LoadedProject,
    accelerators: Sequence[str],
) -> tuple[list[Info], int]:
    """Wait until the generators are ready, and check that they fit the project.

    Returns:
        What they report, and the longest context in tokens.
    """
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
        max_completion_length=settings.trainer.rollout.room_behind_prompt,
        accelerators=accelerators,
        shapes=model_shapes(project.learner.model),
        tables=tables,
        lora=settings.trainer.lora,
        adapted_head=adapted_head(project.learner.model),
    )
    length = min(length, project.learner.fix_positions([info.max_model_len for info in infos.values()]))
    check_fit(settings.trainer, [*project.rows, *project.eval_rows], length)
    return list(infos.values()), length
