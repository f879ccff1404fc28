"""What the parts of a step cost: measured in a run, or written by hand."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError
from yaml import YAMLError, safe_load

from tandem_protocol.config import ConfigError
from tandem_protocol.config.sections import Section

HALF_SPEED_AT = 64.0
DRAWN = 200
"""How many lengths stand for a distribution."""
Seconds = Annotated[float, Field(ge=0.0)]


class LogNormal(Section):
    """Lengths with a long tail: half are below `median`, and `sigma` 1 means that 16 % are above 2.7 times as many."""

    median: float = Field(gt=0.0)
    sigma: float = Field(ge=0.0, le=5.0)
    longest: PositiveInt

    def lengths(self) -> tuple[int, ...]:
        quantiles = [NormalDist().inv_cdf((i + 0.5) / DRAWN) for i in range(DRAWN)]
        drawn = (round(self.median * math.exp(self.sigma * z)) for z in quantiles)
        return tuple(min(self.longest, max(1, length)) for length in drawn)


class Costs(Section):
    """What the simulation knows about a run."""

    num_prompts: PositiveInt
    """Groups per step."""
    num_generations: PositiveInt
    """Completions per group."""
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | LogNormal
    """Lengths of completions in tokens, each equally likely, or a distribution."""
    token_s: float = Field(gt=0.0)
    """Seconds per token of a completion that decodes alone."""
    half_speed_at: float = Field(HALF_SPEED_AT, gt=0.0)
    """Number of other completions beside which a completion decodes at half the speed."""
    max_num_seqs: PositiveInt = 256
    """Completions that a generator decodes side by side. The others wait."""
    update_s: Seconds
    """An update, on `trainer_devices`."""
    trainer_devices: PositiveInt = 1
    trainer_efficiency: float = Field(0.9, gt=0.5, le=1.0)
    """Twice the devices make an update 2 × this faster."""
    publish_s: Seconds = 0.0
    """From the end of an update until all generators serve the version."""
    copy_s: Seconds = 0.0
    """The part of it before the next update can begin, with `max_lag` of 1 or more."""
    pause_s: Seconds = 0.0
    """The part of it in which generators do not decode."""
    other_s: Seconds = 0.0
    """Everything else in a step."""

    @property
    def drawn(self) -> tuple[int, ...]:
        """The lengths, each equally likely."""
        return self.lengths.lengths() if isinstance(self.lengths, LogNormal) else self.lengths

    @property
    def mean_length(self) -> float:
        return fmean(self.drawn)

    def update_on(self, devices: int) -> float:
        """Return the seconds of an update on this number of devices."""
        speedup = 2 * self.trainer_efficiency
        return self.update_s * float(speedup ** -math.log2(devices / self.trainer_devices))


def read_file(path: Path) -> dict[str, Any]:
    """Read a file of costs, or of some of them.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping.
    """
    try:
        written = safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Fix: check the path and permissions.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise ConfigError(f"got {path} with {written!r}, expected a mapping such as `update_s: 12.0`")
    return written


def make_costs(values: dict[str, Any], where: str) -> Costs:
    """Check costs.

    Raises:
        ConfigError: a value is wrong or missing.
    """
    try:
        return Costs.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_problem(error)}") from error


def _problem(error: ValidationError) -> str:
    unknown_first = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    first = unknown_first[0]
    key = ".".join(map(str, first["loc"][:1]))
    if first["type"] == "missing":
        return f"{key} is missing. Fix: add it, or name a run that was measured"
    if first["type"] == "extra_forbidden":
        return f"got the key {key}, expected one of {', '.join(Costs.model_fields)}"
    return f"got {key}: {first['input']!r}, expected another value: {first['msg']}"
