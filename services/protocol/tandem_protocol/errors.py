"""Everything that can go wrong on the wire: one exception a cause, each with its code, status and retry advice."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class ErrorBody(BaseModel):
    """The JSON body of every error answer, and the `error` of a stream that broke off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    message: str
    """What was got, what was wanted and how to fix it."""
    retryable: bool


class TandemError(Exception):
    """Base of all errors that cross the wire. `str(error)` is the message for the person who has to act."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    @property
    def body(self) -> ErrorBody:
        return ErrorBody(code=self.code, message=str(self), retryable=self.retryable)


class BadRequest(TandemError):
    """The request does not fit the contract, or not this model (prompt too long, no such option)."""

    code, status = "bad_request", 422


class Unauthorized(TandemError):
    """No token or the wrong one."""

    code, status = "unauthorized", 401


class NotReady(TandemError):
    """No policy is loaded whole: the generator starts, switches or fixes itself."""

    code, status, retryable = "not_ready", 503, True


class StalePolicy(TandemError):
    """The generator serves an older version than `min_version`."""

    code, status, retryable = "stale_policy", 409, True


class SwitchInProgress(TandemError):
    """Another `PUT /weights` is under way."""

    code, status, retryable = "switch_in_progress", 409, True


class OlderVersion(TandemError):
    """The version is older than the one that serves: a late repetition, or a trainer that has been replaced."""

    code, status = "older_version", 409


class WeightsNotVisible(TandemError):
    """The version's directory did not appear on this side of the shared volume in time."""

    code, status, retryable = "weights_not_visible", 504, True


class WeightsRefused(TandemError):
    """The version's files are not what its manifest says, or not for this model. The old version goes on serving."""

    code, status = "weights_refused", 422


class SwitchFailed(TandemError):
    """The switch did not come about; the last good version serves, if need be loaded back."""

    code, status, retryable = "switch_failed", 503, True


class PolicyTorn(TandemError):
    """Loading failed half-way and so did loading the last good version: the generator must restart."""

    code, status, retryable = "policy_torn", 503, True


class EngineFailed(TandemError):
    """The engine died or broke off."""

    code, status, retryable = "engine_failed", 503, True


class LogprobsNotFinite(TandemError):
    """The engine computes NaN or infinity: the policy itself is broken, and another try gives the same."""

    code = "logprobs_not_finite"


class StoreError(TandemError):
    """The weight store cannot do what was asked (disk full, held by another writer, no such version)."""

    code = "store"


class StoreLocked(StoreError):
    """Another trainer holds the store's writer lease."""

    code = "store_locked"


def not_finite(logprob: object, where: str) -> LogprobsNotFinite:
    """For a logprob that is NaN, infinite or, as some JSON writers put it, null."""
    return LogprobsNotFinite(
        f"got the logprob {logprob} for {where}, expected a finite number: the generator's model computes NaN or "
        "infinity. Usual causes and fixes: a dtype that overflows (set generator.dtype: bfloat16 or float32), weights "
        "that diverged (lower trainer.optim.learning_rate and go on from an earlier checkpoint), or a damaged "
        "checkpoint as shared.model."
    )


def _tree(root: type[TandemError]) -> dict[str, type[TandemError]]:
    return {root.code: root} | {code: cls for sub in root.__subclasses__() for code, cls in _tree(sub).items()}


def from_body(body: ErrorBody) -> TandemError:
    """The exception that `body` was made from, for the client to raise."""
    return _tree(TandemError).get(body.code, TandemError)(body.message)
