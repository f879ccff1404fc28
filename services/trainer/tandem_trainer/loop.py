"""The training loop. `build.py` makes everything that it uses."""

from __future__ import annotations

from .algorithms.base import Algorithm
from .config import TrainerConfig
from .evaluate import Evaluation
from .learner import Learner
from .publish import Publisher
from .rollouts import Rollouts
from .run import Run


def train(
    cfg: TrainerConfig,
    run: Run,
    rollouts: Rollouts,
    learner: Learner,
    algorithm: Algorithm,
    publish: Publisher,
    evaluate: Evaluation,
) -> int:
    """Train until `cfg.max_steps` or SIGTERM. Returns the last step; version v is the policy after v updates."""
    step = run.resume(learner, rollouts)
    with run.checkpoint_on_failure(learner, rollouts):
        with run.timer("publish"):
            version = publish(learner.model, step)  # finds problems with publishing before the first rollout
        if evaluate.due(step):
            with run.timer("evaluate"):
                run.evaluated(evaluate(version))
        run.start_step()
        while step < cfg.max_steps and not run.should_stop():
            with run.timer("wait_for_rollouts"):
                groups = rollouts.next(min_version=step - cfg.max_lag)  # already scored
            batch = algorithm.make_batch(groups, run.gather)
            if not run.agree(batch.has_signal):
                run.skip(groups)
                continue
            with run.timer("update"):
                stats = learner.update(batch, algorithm)  # raises on NaN, before it changes the parameters
            step += 1
            run.make_record(step, groups, stats)
            with run.timer("publish"):
                version = publish(learner.model, step)
            if evaluate.due(step):
                with run.timer("evaluate"):
                    run.evaluated(evaluate(version))
            if run.checkpoint_due(step):
                run.checkpoint(step, learner, rollouts)
            run.log()
    run.last_checkpoint(step, learner, rollouts)
    return step
