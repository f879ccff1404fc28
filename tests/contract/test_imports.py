"""Which module may import which. A new dependency needs a new entry in these tables."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "tandem_protocol": ROOT / "services/protocol/tandem_protocol",
    "tandem_generator": ROOT / "services/generator/tandem_generator",
    "tandem_rollout": ROOT / "services/rollout/tandem_rollout",
    "tandem_trainer": ROOT / "services/trainer/tandem_trainer",
    "tandem_cli": ROOT / "cli/tandem_cli",
}

ALLOWED = {
    "tandem_protocol": {"numpy", "packaging", "pydantic", "pydantic_core", "yaml", "xxhash"},
    "tandem_generator": {"tandem_protocol"},
    "tandem_rollout": {"tandem_protocol"},
    "tandem_trainer": {"tandem_protocol", "tandem_rollout"},
    "tandem_cli": {
        "tandem_protocol",
        "docker",
        "fastapi",
        "httpx",
        "matplotlib",
        "plotly",
        "psutil",
        "pydantic",
        "rich",
        "shtab",
        "testcontainers",
        "uvicorn",
        "yaml",
    },
}
"""Allowed imports: for protocol and CLI everything outside the standard library, for the services Tandem's packages."""

ONLY_IN = {
    "numpy": {"tandem_protocol.delta", "tandem_rollout", "tandem_trainer"},
    "vllm": {
        "tandem_generator.engines.vllm",
        "tandem_generator.vllm_server",
        "tandem_generator.plugin",
        "tandem_generator.volume_engine",
        "tandem_generator.vllm_worker",
    },
    "httpx": {
        "tandem_rollout.adapters.openenv",
        "tandem_rollout.answers",
        "tandem_rollout.awaited_versions",
        "tandem_rollout.client",
        "tandem_rollout.connections",
        "tandem_rollout.protocols",
        "tandem_rollout.streams",
        "tandem_rollout.environments.servers",
        "tandem_cli",
    },
    "plotly": {"tandem_cli.run_list.picture"},
    "shtab": {"tandem_cli.completion"},
    "testcontainers": {"tandem_cli.testing"},
    "fastapi": {
        "tandem_generator.mock_completions",
        "tandem_generator.plugin",
        "tandem_generator.routes",
        "tandem_generator.server",
        "tandem_generator.vllm_routes",
        "tandem_rollout.environments.routes",
        "tandem_cli.watch",
    },
}
"""Library → the modules or packages that may import it."""

NEVER = {
    "tandem_generator.engines": {"fastapi", "starlette", "tandem_generator.routes", "tandem_generator.weight_switcher"},
    "tandem_generator.weight_switcher": {
        "fastapi",
        "tandem_generator.engines.mock",
        "tandem_generator.engines.vllm",
        "torch",
    },
    "tandem_generator.routes": {"tandem_generator.engines", "torch"},
    "tandem_rollout": {"accelerate", "peft", "torch"},
    "tandem_trainer.learner": {"tandem_trainer.run"},
    "tandem_trainer.loop": {"accelerate", "torch", "tandem_rollout.client"},
}
"""Module or package → what it must not import."""

ALGORITHMS = {
    *("__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "inspect", "math", "typing", "torch"),
    *("tandem_trainer.algorithms", "tandem_trainer.batch", "tandem_protocol.config", "tandem_protocol.messages"),
    *("tandem_protocol.version", "tandem_rollout.errors", "tandem_rollout.functions", "tandem_rollout.trajectory"),
}
"""Everything that `algorithms/` may import, including the standard library. It must not do any I/O.

`tandem_rollout.functions` imports losses of the user's project by name.
"""


def modules() -> Iterator[tuple[str, set[str]]]:
    """Yield every module of Tandem with the names that it imports. Relative imports are resolved."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            parent = parts[:-1]
            name = ".".join(parent if parts[-1] == "__init__" else parts)
            yield name, set(imports(ast.parse(path.read_text()), parent))


def imports(tree: ast.AST, parent: list[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # The imported name may be a module (`from . import metrics`) or a member (`from .metrics import READY`).
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def within(name: str, scopes: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{scope}.") for scope in scopes)


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize(("module", "imported"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_what_the_tables_allow(module: str, imported: set[str]) -> None:
    package = top(module)
    ours = {name for name in imported if top(name) in PACKAGES and top(name) != package}
    foreign = {name for name in imported if top(name) not in sys.stdlib_module_names | PACKAGES.keys()}
    closed = ours | foreign if package in ("tandem_protocol", "tandem_cli") else ours
    wrong = {name for name in closed if top(name) not in ALLOWED[package]}
    wrong |= {name for name in imported if top(name) in ONLY_IN and not within(module, ONLY_IN[top(name)])}
    wrong |= {
        name for scope, never in NEVER.items() if within(module, {scope}) for name in imported if within(name, never)
    }
    if within(module, {"tandem_trainer.algorithms"}):
        wrong |= {name for name in imported if not within(name, ALGORITHMS)}
    assert not wrong, (
        f"{module} imports {', '.join(sorted(wrong))}: which the tables in {Path(__file__).name} do not allow"
    )


def test_the_modules_in_the_tables_exist() -> None:
    known = {name for name, _ in modules()}
    named = {scope for scopes in ONLY_IN.values() for scope in scopes} | NEVER.keys()
    assert named <= known


@pytest.mark.parametrize(
    "import_",
    [
        "import tandem_protocol.store, tandem_protocol.config.project, tandem_protocol.fingerprint",
        "import tandem_generator.engines.mock, tandem_generator.server, tandem_generator.__main__",
        "import tandem_cli.__main__, tandem_cli.gpus, tandem_cli.doctor.command, tandem_cli.project",
        "import tandem_rollout.client",
    ],
    ids=["protocol", "mock generator", "cli", "client"],
)
def test_what_must_start_quickly_does_not_import_torch_or_vllm_or_transformers(import_: str) -> None:
    program = f"{import_}\nimport sys\nprint(*{{'torch', 'vllm', 'transformers', 'numpy'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
