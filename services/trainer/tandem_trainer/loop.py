"""The training loop. `build.py` makes everything that it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.version import Version
from tandem_rollout.queue import Rollouts
from tandem_rollout.trajectory import Group

from .algorithms.base import Algorithm
from .batch import Batch
from .learner.learner import Learner
from .run.run import Run


def train(
    cfg: TrainerConfig,
    run: Run,
    rollouts: Rollouts,
    learner: Learner,
    algorithm: Algorithm,
    *,
    sample: Callable[[int], list[Group]],
    update: Callable[[Batch, Algorithm], dict[str, float]],
    publish: Callable[[int], Version],
    published: Callable[[], None],
    evaluate: Callable[[int, Version], dict[str, Any] | None],
) -> int:
    """Train until `cfg.max_steps` or SIGTERM. Returns the last step; version v is the policy after v updates.

    The functions are the phases of a step. `build.py` makes them, and measures their time. With `max_lag` of 1 or more,
    `publish` returns when the parameters may change. The generators load the version during the next update, and the
    next step raises an error of that. `published` waits for it.
    """
    step = run.resume(learner, rollouts)
    with run.checkpoint_on_failure(learner, rollouts):
        version = publish(step)  # finds problems with publishing before the first rollout
        run.evaluated(evaluate(step, version))  # None if no evaluation is due
        run.start_step()
        while step < cfg.max_steps and not run.should_stop():
            groups = sample(step - cfg.max_lag)  # the argument is the oldest version allowed; they are already scored
            batch = algorithm.make_batch(groups, run.gather)
            if not run.agree(batch.has_signal):
                run.skip(groups)
                continue
            stats = update(batch, algorithm)  # raises on NaN, before it changes the parameters
            step += 1
            run.make_record(step, groups, stats, rollouts.learned(), learner.trained)
            version = publish(step)
            run.evaluated(evaluate(step, version))
            run.check_alerts()
            if run.checkpoint_due(step):
                run.checkpoint(step, learner, rollouts)
            run.log()
        published()  # a run that was asked to stop may have a version in flight
    run.last_checkpoint(step, learner, rollouts)
    return step
