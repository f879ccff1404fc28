"""vLLM's log lines in the format of Tandem's own, and fewer of them. vLLM reads this when it is imported."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tandem_protocol.problems import one_line

CONFIG_PATH = "VLLM_LOGGING_CONFIG_PATH"
TORCH_LOGS = "TORCH_LOGS"
"""What torch logs. Like `CONFIG_PATH`, it reaches the engine's processes, which import torch first."""
FAILURE_PATH = "TANDEM_VLLM_FAILURE_PATH"
"""File for the exception because of which the engine cannot start."""
FAILED = "failed to start"
"""What vLLM logs with that exception: `EngineCore failed to start.`, `WorkerProc failed to start.`"""
PROGRESS = ("vllm.model_executor.model_loader", "vllm.v1.worker", "vllm.v1.core.kv_cache_utils")
"""Loggers whose INFO lines say how far the start is: loading weights, and the size of the KV cache."""

MEANINGLESS = (
    "Triton is ", "Model Runner V2 requires Triton", "Enforce eager set", "Inductor compilation was disabled",
    "Reset SSM cache type", "CPU backend doesn't allow to use `torch.set_num_threads`", "Passing raw prompts to",
)  # fmt: skip
"""How warnings begin that users can do nothing about: hints to vLLM's developers, and that a CPU is not a GPU."""
IGNORED_WARNINGS = ("ignore::FutureWarning:vllm.triton_utils.dispatcher",)
"""Python warnings of vLLM about its own code, in the form of PYTHONWARNINGS."""


class Meaningful(logging.Filter):
    """Keeps all records but those of `MEANINGLESS`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(MEANINGLESS)


class FirstFailure(logging.Handler):
    """Writes why the engine cannot start into a file, because vLLM does not hand it to the server's process.

    The first such exception counts: those of the engine follow from that of its worker. Others, such as that of a
    plugin that cannot be loaded, do not end the start.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write the exception of a record, if it ends the start and no other was written."""
        path = os.environ.get(FAILURE_PATH)
        if path and FAILED in record.getMessage() and record.exc_info and (error := record.exc_info[1]):
            with suppress(OSError), Path(path).open("x") as file:
                file.write(one_line(error))


def first_failure() -> str | None:
    """Return why the engine cannot start. None if it is not known."""
    with suppress(KeyError, OSError):
        return Path(os.environ[FAILURE_PATH]).read_text() or None
    return None


def configure_vllm_logging(engine_env: Mapping[str, str]) -> None:
    """Name a logging configuration in the environment, for this process and the engine's.

    A configuration that the user names is left alone. `VLLM_LOGGING_LEVEL` sets the level of all of vLLM's
    loggers.

    Args:
        engine_env: `generator.env`.
    """
    env = {**os.environ, **engine_env}
    if TORCH_LOGS not in env:
        os.environ[TORCH_LOGS] = "-torch._library.triton"  # it warns that a CPU has no Triton
    if CONFIG_PATH in env or env.get("VLLM_CONFIGURE_LOGGING") == "0":
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # below, torch's C++ code reports each binding to NUMA nodes
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [env.get("PYTHONWARNINGS"), *IGNORED_WARNINGS]))
    level = env.get("VLLM_LOGGING_LEVEL")
    with tempfile.NamedTemporaryFile("w", prefix="tandem-vllm-logging-", suffix=".json", delete=False) as file:
        json.dump(logging_config(level), file)
    os.environ[CONFIG_PATH] = file.name
    os.environ[FAILURE_PATH] = f"{file.name}.failure"


def logging_config(level: str | None) -> dict[str, object]:
    """The argument of `logging.config.dictConfig`. `level`: for all loggers; None: INFO for progress, else WARNING."""
    chatty = {} if level else {name: {"level": "INFO"} for name in PROGRESS}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"tandem": {"()": "tandem_protocol.logs.make_formatter"}},
        "filters": {"meaningful": {"()": "tandem_generator.vllm_logging.Meaningful"}},
        "handlers": {
            "tandem": {
                "class": "logging.StreamHandler",
                "formatter": "tandem",
                "filters": [] if level else ["meaningful"],
                "stream": "ext://sys.stdout",
            },
            "failure": {"class": "tandem_generator.vllm_logging.FirstFailure", "level": "ERROR"},
        },
        "loggers": {
            "vllm": {"handlers": ["tandem", "failure"], "level": (level or "WARNING").upper(), "propagate": False},
            **chatty,
        },
    }
