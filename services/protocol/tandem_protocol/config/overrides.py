"""Parse dotted options of the command line, such as `--trainer.max_steps 5`."""

from __future__ import annotations

from collections.abc import Iterable

from .sections import SECTIONS, ConfigError


def parse_overrides(arguments: Iterable[str]) -> dict[str, str]:
    """Parse dotted options.

    `--trainer.max_steps 5` and `--trainer.max_steps=5` both give `{"trainer.max_steps": "5"}`. If a key appears several
    times, the last value wins. Values are not parsed here; `load` does that.

    Args:
        arguments: The arguments of the command line.

    Returns:
        Dotted key → value as it was written.

    Raises:
        ConfigError: An argument has another form, or an option has no value.
    """
    overrides = {}
    rest = iter(arguments)
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
