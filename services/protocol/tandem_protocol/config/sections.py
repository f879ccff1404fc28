"""Base classes of the configuration, and the section that both services read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..secrets import mask

SECTIONS = ("shared", "generator", "trainer")
"""Sections of the YAML file."""
FUNCTION_NAME = r"^[\w.]+:\w+$"
"""Pattern of `module:function`, the name of a function of the project or of a package."""


class ConfigError(ValueError):
    """The configuration is invalid. The message names the key, its value, what was expected and the fix.

    Secrets in the message are masked.
    """

    def __init__(self, message: str) -> None:
        super().__init__(mask(message))


class Section(BaseModel):
    """Base of all configuration models. The docstring of a field is its description in docs/reference/config.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _are_base_urls(urls: tuple[str, ...]) -> tuple[str, ...]:
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"got {url}, expected a base URL such as http://127.0.0.1:8000")
        parts.port  # noqa: B018 - raises for an invalid port
    return tuple(url.rstrip("/") for url in urls)


BaseUrls = Annotated[tuple[str, ...], AfterValidator(_are_base_urls)]
"""URLs without a path."""


class SharedConfig(Section):
    """Settings that generator and trainer must agree on."""

    model: str
    """Directory of a Hugging Face model, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None: the hub's default branch. Ignored for a directory."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Set it only for models whose code you trust."""
    weights_dir: Path = Path("weights")
    """Directory of the weight store. It must be the same volume for the trainer and all generators."""
    generators: BaseUrls = Field(("http://127.0.0.1:8000",), min_length=1)
    """Base URLs of all generator replicas. The trainer waits until all of them serve a new version."""


class SharedSettings(Section):
    """Only the section `shared`, for tools that need no other."""

    shared: SharedConfig
