"""What differs when a script was started with `python -m tandem_trainer.trl`: it stops on signals, and may resume."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_protocol.config import ConfigError

from ..run.stopping import Stopped, StopRequest, exit_status
from .stopping import StopAfterStep, newest_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How a script was started."""

    resume: bool = False
    """Training begins at the newest checkpoint, if the script itself names none."""
    is_rehearsal: bool = False
    """The script ends when it has made its trainer."""

    def train(self, trainer: Any, stop: StopRequest, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `run`, which trains.

        Raises:
            ConfigError: A rehearsal cannot go on, because the script trains without a generator.
            SystemExit: A signal has stopped the training.
        """
        if self.is_rehearsal:
            raise ConfigError(
                f"got a {type(trainer).__name__} that trains before a trainer with use_vllm=True and "
                "vllm_mode='server' is made, so it is not known which model the generators need. Fix: set both in the "
                "trainer's arguments, or name the model as shared.model in tandem.yaml."
            )
        if self.resume and not args and not kwargs.get("resume_from_checkpoint"):
            checkpoint = newest_checkpoint(Path(trainer.args.output_dir))
            log.info("resuming from %s", checkpoint) if checkpoint else log.info("no checkpoint to resume from")
            kwargs["resume_from_checkpoint"] = checkpoint and str(checkpoint)
        stopper = StopAfterStep(stop)
        trainer.add_callback(stopper)
        try:
            result = run(*args, **kwargs)
        except Stopped as error:
            assert stop.signal is not None, "it was asked to stop"
            if stopper.stopped_by:
                log.warning("stopped with a checkpoint, but the generators do not serve its weights")
            else:
                log.warning("stopped while waiting for a generator, without a new checkpoint")
            raise SystemExit(exit_status(stop.signal)) from error
        finally:
            stopper.leave_signals()
            trainer.remove_callback(stopper)
        if stopper.stopped_by:
            raise SystemExit(exit_status(stopper.stopped_by))
        return result
