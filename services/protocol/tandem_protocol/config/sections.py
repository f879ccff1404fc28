"""What every configuration model is made of, and the section that both services read."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

SECTIONS = ("shared", "generator", "trainer")


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the key, its value, what was expected and the fix."""


class Section(BaseModel):
    """Base of all configuration models. The text below a field is its description in docs/reference/config.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class SharedConfig(Section):
    """What both services must agree on."""

    model: str
    """Directory of a Hugging Face model, or its id on the hub."""
    revision: str | None = None
    trust_remote_code: bool = False
    weights_dir: Path = Path("weights")
    """Root of the weight store; the same volume on both sides."""
    generators: tuple[str, ...] = Field(("http://127.0.0.1:8000",), min_length=1)
    """Base URL of every generator replica; a version is published when all of them serve it."""

    @field_validator("generators")
    @classmethod
    def _are_base_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
                raise ValueError(f"got {url}, expected a base URL such as http://127.0.0.1:8000")
            parts.port  # noqa: B018 - raises for an invalid port
        return tuple(url.rstrip("/") for url in urls)
