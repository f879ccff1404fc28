"""Load the configuration of all services from one YAML file.

The file has the sections `shared`, `generator` and `trainer`. Each service validates its own section and `shared`. The
models are in `sections`, `generator`, `rollout`, `learning` and `trainer`. `project` has all sections.
Values come from four sources. Later ones override earlier ones: defaults, the YAML file, environment variables such as
`TANDEM__TRAINER__OPTIM__LEARNING_RATE`, and the command line. Secrets are not part of the configuration.
"""

from .bearer import (
    ENVIRONMENT_TOKEN_ENV,
    ENVIRONMENT_TOKEN_FILE_ENV,
    TOKEN_ENV,
    TOKEN_FILE_ENV,
    is_authorized,
    read_environment_token,
    read_token,
)
from .loading import ENV_PREFIX, load
from .overrides import parse_overrides
from .resolved import Resolved, format_resolved, read_resolved, resolved
from .sections import SECTIONS, ConfigError, Section, SharedConfig, SharedSettings

__all__ = [
    "ENVIRONMENT_TOKEN_ENV",
    "ENVIRONMENT_TOKEN_FILE_ENV",
    "ENV_PREFIX",
    "SECTIONS",
    "TOKEN_ENV",
    "TOKEN_FILE_ENV",
    "ConfigError",
    "Resolved",
    "Section",
    "SharedConfig",
    "SharedSettings",
    "format_resolved",
    "is_authorized",
    "load",
    "parse_overrides",
    "read_environment_token",
    "read_resolved",
    "read_token",
    "resolved",
]
