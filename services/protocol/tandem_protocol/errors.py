"""Every error that crosses the wire. Each one is an exception with a code, an HTTP status and retry advice.

The generator answers an error with the JSON of an [`ErrorBody`][tandem_protocol.errors.ErrorBody]. The client turns it
back into the same exception with [`from_body`][tandem_protocol.errors.from_body].
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class ErrorBody(BaseModel):
    """JSON body of every error answer, and the `error` of a stream that ended early."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    """Machine-readable name of the error, such as `stale_policy`."""
    message: str
    """What the generator got, what it expected, and how to fix it."""
    retryable: bool
    """True if the same request may succeed later."""


class TandemError(Exception):
    """Base of all errors that cross the wire. `str(error)` is the message for the user."""

    code: ClassVar[str] = "internal"
    """Machine-readable name of the error."""
    status: ClassVar[int] = 500
    """HTTP status of the answer."""
    retryable: ClassVar[bool] = False
    """True if the same request may succeed later."""

    @property
    def body(self) -> ErrorBody:
        """The error as it is sent over the wire."""
        return ErrorBody(code=self.code, message=str(self), retryable=self.retryable)


class BadRequest(TandemError):
    """The request does not match the contract or this model, for example because the prompt is too long."""

    code = "bad_request"
    status = 422


class Unauthorized(TandemError):
    """The token is missing or wrong."""

    code = "unauthorized"
    status = 401


class NotReady(TandemError):
    """No policy is completely loaded: the generator is starting, stopping or recovering."""

    code = "not_ready"
    status = 503
    retryable = True


class StalePolicy(TandemError):
    """The generator serves an older version than `min_version`."""

    code = "stale_policy"
    status = 409
    retryable = True


class SwitchInProgress(TandemError):
    """Another `PUT /weights/{version}` is still running."""

    code = "switch_in_progress"
    status = 409
    retryable = True


class OlderVersion(TandemError):
    """The version is older than the one that is served.

    The request was repeated too late, or it comes from a trainer that has been replaced.
    """

    code = "older_version"
    status = 409


class WeightsNotVisible(TandemError):
    """The version's directory did not appear on the generator's side of the shared volume in time."""

    code = "weights_not_visible"
    status = 504
    retryable = True


class WeightsRefused(TandemError):
    """The version's files do not match their manifest, or they belong to another model. The old version stays."""

    code = "weights_refused"
    status = 422


class SwitchFailed(TandemError):
    """The switch failed. The previous version is served; it was loaded again if necessary."""

    code = "switch_failed"
    status = 503
    retryable = True


class PolicyTorn(TandemError):
    """Loading a version failed half-way, and so did loading the previous version. The generator must restart."""

    code = "policy_torn"
    status = 503
    retryable = True


class EngineFailed(TandemError):
    """The inference engine died or ended a request early."""

    code = "engine_failed"
    status = 503
    retryable = True


class LogprobsNotFinite(TandemError):
    """The engine computes NaN or infinity. The policy itself is broken, so another try gives the same result."""

    code = "logprobs_not_finite"


class StoreError(TandemError):
    """The weight store cannot do what was asked, for example because the disk is full."""

    code = "store"


class StoreLocked(StoreError):
    """Another trainer is writing the weight store."""

    code = "store_locked"


def not_finite(logprob: object, where: str) -> LogprobsNotFinite:
    """Return the error for a logprob that is NaN or infinite.

    Args:
        logprob: The value. Some JSON writers turn NaN into null, which is None here.
        where: Which token has it, for the message.
    """
    return LogprobsNotFinite(
        f"got the logprob {logprob} for {where}, expected a finite number: the generator's model computes NaN or "
        "infinity. Usual causes and fixes: a dtype that overflows (set generator.dtype: bfloat16 or float32), weights "
        "that diverged (lower trainer.optim.learning_rate and resume from an earlier checkpoint), or a damaged "
        "checkpoint in shared.model."
    )


def _tree(root: type[TandemError]) -> dict[str, type[TandemError]]:
    return {root.code: root} | {code: cls for sub in root.__subclasses__() for code, cls in _tree(sub).items()}


def from_body(body: ErrorBody) -> TandemError:
    """Return the exception that `body` was made from, for the client to raise.

    A code that this release does not know gives a plain `TandemError`, with the message of `body`.
    """
    return _tree(TandemError).get(body.code, TandemError)(body.message)
