"""What `tandem_trainer.trl` takes for granted about TRL, in each version of `make trl`. Only source is read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from support import trl
from tandem_trainer.trl.client import TandemClient
from tandem_trainer.trl.takeover import CLIENT_MODULES

pytestmark = pytest.mark.trl


@cache
def modules(python: Path) -> dict[str, ast.Module]:
    """Return module name → syntax tree of all modules of TRL that mention its client."""
    (package,) = python.parents[1].glob("lib/python*/site-packages/trl")
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): ast.parse(text)
        for path, text in texts.items()
        if "VLLMClient" in text or "vllm_client" in text
    }


def client_module(python: Path) -> str:
    (name,) = set(CLIENT_MODULES) & {name for name, tree in modules(python).items() if client_class(tree)}
    return name


def client_class(tree: ast.Module) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "VLLMClient"), None)


def users(python: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules that make a client, without those of the asynchronous trainers, which are refused."""
    for name, tree in modules(python).items():
        makes = any(isinstance(node, ast.Call) and ast.unparse(node.func) == "VLLMClient" for node in ast.walk(tree))
        if makes and name != client_module(python) and ".async_" not in name:
            yield name, tree


def imports(tree: ast.Module, name: str) -> set[str]:
    """Return the last parts of the modules from which a module imports `name` into its globals."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {(node.module or "").rpartition(".")[2] for node in nodes if name in {alias.name for alias in node.names}}


@pytest.mark.parametrize("python", trl.EACH_VERSION)
def test_each_module_that_makes_a_client_imports_it_from_the_module_that_is_replaced(python: Path):
    found = dict(users(python))
    assert len(found) >= 1
    for name, tree in found.items():
        assert imports(tree, "VLLMClient") == {"vllm_client"}, name


def test_the_two_modules_of_the_newest_version_have_their_names():
    names = [name for name, tree in users(trl.NEWEST)]
    for name in ("trl.generation.vllm_generation", "trl.experimental.online_dpo.online_dpo_trainer"):
        assert name in names
        assert imports(modules(trl.NEWEST)[name], "is_vllm_available") == {"import_utils"}


@pytest.mark.parametrize("python", trl.EACH_VERSION)
def test_the_client_has_every_method_of_trls(python: Path):
    body = client_class(modules(python)[client_module(python)])
    assert body is not None
    public = {node.name for node in body.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    assert {"generate", "init_communicator", "update_named_param", "close_communicator"} <= public
    assert {name for name in public if not hasattr(TandemClient, name)} == set()


@pytest.mark.parametrize("python", trl.EACH_VERSION)
def test_trainers_keep_the_client_and_the_last_loaded_step_where_they_are_looked_for(python: Path):
    (package,) = python.parents[1].glob("lib/python*/site-packages/trl")
    text = (package / "trainer/grpo_trainer.py").read_text()
    assert "self._last_loaded_step" in text
    assert ("self.vllm_generation" in text) or ("def _move_model_to_vllm" in text)


def test_asynchronous_trainers_are_known_by_the_names_of_their_modules():
    (package,) = trl.NEWEST.parents[1].glob("lib/python*/site-packages/trl")
    own = [
        path for path in package.rglob("*.py") if "class Async" in path.read_text() and "Trainer(" in path.read_text()
    ]
    assert own
    assert all("async_" in path.name or "async_" in path.parent.name for path in own)
