"""Download the project's model from the Hugging Face hub. A hiccup of the network or the hub is retried."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from http import HTTPStatus

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from tandem_protocol.config import ConfigError
from tandem_protocol.problems import one_line

log = logging.getLogger("tandem_preflight")

RETRY_FOR_S = 60.0
"""How long a download that fails is tried again, in seconds."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 30.0
"""Pause before the first retry, and the longest. It doubles with each further one."""
RETRIED_STATUSES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Answers below 500 that another try may change. The others are about the model's name or the token."""


class Unreachable(Exception):
    """The last try failed too. Starting again later may help."""


def is_cached(model: str, revision: str | None) -> bool:
    """Whether the cache has all files of the model, as far as it is known which files those are."""
    try:
        snapshot_download(model, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def download_model(model: str, revision: str | None, files: Sequence[str] | None = None) -> None:
    """Download a model to the cache, unless it is there.

    Args:
        files: patterns of the names of the files to download. None: all.

    Raises:
        ConfigError: a retry would not help, because the model does not exist or the token may not read it.
        Unreachable: the hub or the network failed for RETRY_FOR_S.
    """

    def download() -> None:
        snapshot_download(model, revision=revision, allow_patterns=None if files is None else [*files])

    try:
        retried(download, f"downloading {model}", is_final)
    except Unreachable as error:
        raise Unreachable(
            f"shared.model: {model!r} is not a directory of the project, so it should be on the hub, but {error} Fix: "
            "check the name, this machine's network and the hub, and start again."
        ) from error
    except Exception as error:  # final ones, of many types
        raise ConfigError(
            f"shared.model: got {model!r}, expected a directory of the project or a model id of the hub, which "
            f"answers: {one_line(error)}. Fix: check the name and the revision. A private or gated model needs a token "
            "that may read it: TANDEM_HF_TOKEN_FILE under Compose, huggingFace in the chart's values."
        ) from error


def retried(task: Callable[[], object], what: str, is_final: Callable[[Exception], bool]) -> None:
    """Run `task`, again with growing pauses while it fails.

    Args:
        what: what the task does, for the log.
        is_final: whether an error would be the same at the next try.

    Raises:
        Unreachable: the last try failed too.
        Exception: an error of `task` that is final.
    """
    deadline = time.monotonic() + RETRY_FOR_S
    until = datetime.now() + timedelta(seconds=RETRY_FOR_S)
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            task()
            return
        except Exception as error:  # any type: the HTTP library's errors are not OSErrors
            if is_final(error):
                raise
            if time.monotonic() + pause_s > deadline:
                raise Unreachable(f"{what} failed for {RETRY_FOR_S:.0f} s: {one_line(error)}.") from error
            log.warning(
                "%s failed: %s. Trying again in %.0f s, until %s", what, one_line(error), pause_s, f"{until:%H:%M:%S}"
            )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def is_final(error: Exception) -> bool:
    """Whether the hub would answer the same at the next try."""
    for cause in _causes(error):
        if isinstance(cause, HFValidationError | OfflineModeIsEnabled):
            return True
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            return status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in RETRIED_STATUSES
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
