"""Write YAML that `reading` has read. A value keeps its quotes, or has none, because its type may depend on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .reading import Key, Plain


class _Dumper(yaml.SafeDumper):
    pass


def _plain(dumper: yaml.SafeDumper, value: Plain) -> yaml.Node:
    tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))  # type: ignore[no-untyped-call]
    return dumper.represent_scalar(tag, str(value))


_Dumper.add_representer(Plain, _plain)
_Dumper.add_representer(Key, lambda dumper, key: dumper.represent_str(str(key)))


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return a tree of `read_file` as YAML."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False)
