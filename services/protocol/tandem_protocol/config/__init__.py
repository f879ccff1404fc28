"""One YAML for the whole stack, and where each of its values came from.

Sections `shared`, `generator`, `trainer`; each service validates its own and `shared`. Last wins: defaults, YAML,
environment (`TANDEM__TRAINER__OPTIM__LEARNING_RATE`), command line. Secrets never stand in it.
"""

from .bearer import TOKEN_ENV, TOKEN_FILE_ENV, read_token
from .loading import ENV_PREFIX, load
from .overrides import parse_overrides
from .resolved import Resolved, format_resolved, resolved
from .sections import SECTIONS, ConfigError, Section, SharedConfig

__all__ = [
    "ENV_PREFIX",
    "SECTIONS",
    "TOKEN_ENV",
    "TOKEN_FILE_ENV",
    "ConfigError",
    "Resolved",
    "Section",
    "SharedConfig",
    "format_resolved",
    "load",
    "parse_overrides",
    "read_token",
    "resolved",
]
