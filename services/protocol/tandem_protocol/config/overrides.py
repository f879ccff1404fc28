"""Dotted options on a command line."""

from __future__ import annotations

from collections.abc import Iterable

from .sections import SECTIONS, ConfigError


def parse_overrides(arguments: Iterable[str]) -> dict[str, str]:
    """`--trainer.max_steps 5` or `--trainer.max_steps=5` → `{"trainer.max_steps": "5"}`; the last one of a key wins.

    Values stay as they are written, so that a command can hand them on: `load` reads them, and reads them once.

    Raises:
        ConfigError: an argument of another form, or a key without a value.
    """
    overrides, rest = {}, iter(arguments)
    for argument in rest:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key.split(".", 1)[0] not in SECTIONS or "." not in key:
            raise ConfigError(
                f"got the argument {argument!r}; expected an option from --help, or --SECTION.KEY VALUE with one of "
                f"the sections {', '.join(SECTIONS)}"
            )
        value = text if equals else next(rest, None)
        if value is None:
            raise ConfigError(f"{argument} has no value; expected {argument} VALUE")
        overrides[key] = value
    return overrides
