"""Keys of the configuration on a command line."""

from __future__ import annotations

from collections.abc import Iterable

from .sections import SECTIONS, ConfigError


def parse_overrides(arguments: Iterable[str]) -> dict[str, str]:
    """Return `{"trainer.max_steps": "5"}` for `--trainer.max_steps 5` or `--trainer.max_steps=5`.

    If a key is given twice, its last value wins. Values are not converted: `load` does that, so that a command can pass
    them on to a service as they are.

    Raises:
        ConfigError: an argument has another form, or a key has no value.
    """
    overrides: dict[str, str] = {}
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
