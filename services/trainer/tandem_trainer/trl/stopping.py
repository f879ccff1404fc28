# ruff: noqa: ARG002 - the arguments of a callback are transformers'
"""Stop a script on a signal after the step that it is at, with a checkpoint, and resume it from there."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from ..run.stopping import STOPPED, StopRequest

COMPLETE = "trainer_state.json"
"""The file that a checkpoint gets last."""


class StopAfterStep(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Has transformers write a checkpoint and stop, at the same step in all ranks."""

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._handlers: dict[int, Any] = {}
        self.stopped_by: int | None = None
        """The signal that has stopped the training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From now on, a signal stops the training. A second one ends the process at once."""
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self._request.on_signals()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if any rank was asked to."""
        asked = self._request.signal or 0
        if is_several():
            everyones = torch.tensor(asked, device=args.device)
            distributed.all_reduce(everyones, distributed.ReduceOp.MAX)
            asked = int(everyones)
        if asked and state.global_step < state.max_steps:
            self.stopped_by = asked
            control.should_log = control.should_save = control.should_training_stop = True

    def leave_signals(self) -> None:
        """Leave signals to the script again. The caller does so when training has ended, also with an error."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def is_several() -> bool:
    """Whether this is one of several ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_stop(error: BaseException) -> bool:
    """Whether training was ended on purpose: by a signal, or by a `sys.exit` of the script that is not for an error."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (None, 0, *STOPPED))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step in the output folder of a TRL trainer."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    steps = {int(path.name.rpartition("-")[2]): path for path in found if path.name.rpartition("-")[2].isdecimal()}
    return steps[max(steps)] if steps else None
