"""How the doctor gathers facts: whose environment counts, where it looks for the model, what it cannot see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.facts import a_stack, an_image, on_cpus
from support.models import make_tiny_model
from tandem_cli.doctor import gather
from tandem_cli.doctor.facts import DockerEngine, Model, Mount, Stack
from tandem_cli.doctor.gather import find_model, read_available_memory, read_disk, read_settings
from tandem_cli.doctor.unknown import Refused, Unknown
from tandem_protocol.config.project import ProjectSettings

NO_ENGINE = Unknown("no Docker engine answers")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(
        "shared: {model: model}\ngenerator: {tensor_parallel_size: 2, dtype: float32}\n"
        "trainer: {max_steps: 1, rewards: [{function: 'rewards:score'}]}\n"
    )
    return tmp_path


def a_stack_of(project: Path, **changes: dict[str, object]) -> Stack:
    """Return a stack whose preflight copies `project`."""
    source = Mount(str(project), "/source", read_only=True)
    return a_stack(**{**changes, "preflight": {"mounts": (source,), **changes.get("preflight", {})}})


def settings_of(stack: Stack) -> ProjectSettings:
    settings = read_settings(stack, {"generator": an_image("generator", TANDEM__GENERATOR__ENGINE="mock")})
    assert isinstance(settings, ProjectSettings)
    return settings


def test_the_configuration_is_read_with_the_services_environment(project: Path) -> None:
    generator = settings_of(a_stack_of(project)).generator
    assert (generator.engine, generator.tensor_parallel_size, generator.dtype) == ("mock", 2, "float32")
    env = {"TANDEM__GENERATOR__ENGINE": "vllm", "TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE": "4"}
    generator = settings_of(a_stack_of(project, generator={"env": env})).generator
    assert (generator.engine, generator.tensor_parallel_size, generator.dtype) == ("vllm", 4, "float32")


def test_a_project_with_an_invalid_configuration_is_refused(project: Path) -> None:
    (project / "config.yaml").write_text("shared: {}\n")
    refused = read_settings(a_stack_of(project), {})
    assert isinstance(refused, Refused)
    assert "shared.model is missing" in refused.message


def test_a_script_needs_no_configuration_but_its_tandem_yaml_is_read(project: Path) -> None:
    (project / "config.yaml").unlink()
    stack = a_stack_of(project, trainer={"env": {"TANDEM_SCRIPT": "train.py"}})
    found = read_settings(stack, {})
    assert isinstance(found, Unknown)
    assert not isinstance(found, Refused)
    (project / "tandem.yaml").write_text("generator: {dtypo: float32}")
    assert isinstance(read_settings(stack, {}), Refused)


def test_a_model_is_found_in_the_project_or_made_by_prepare_or_on_the_hub(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(gather, "ask_hub", lambda *question: asked.append(question) or Unknown("asked"))
    stack = a_stack_of(project, preflight={"env": {"HF_TOKEN": "t"}})
    settings = settings_of(stack)
    assert find_model(stack, settings, NO_ENGINE) == Unknown("asked")
    assert asked == [("model", None, stack.services["preflight"])]
    (project / "prepare.py").touch()
    made = find_model(stack, settings, NO_ENGINE)
    assert isinstance(made, Unknown)
    assert "prepare.py" in made.message
    make_tiny_model(project / "model")
    assert isinstance(find_model(stack, settings, NO_ENGINE), Model)
    assert len(asked) == 1


def test_in_a_container_the_engines_disk_is_that_of_the_containers_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = on_cpus().engine
    assert isinstance(engine, DockerEngine)
    engine = replace(engine, root_dir=tmp_path / "hidden")
    monkeypatch.setattr(gather, "IN_CONTAINER", tmp_path / "none")
    assert isinstance(read_disk(engine), Unknown)
    monkeypatch.setattr(gather, "IN_CONTAINER", tmp_path)
    assert isinstance(read_disk(engine), int)


def test_disk_and_free_memory_of_a_remote_engine_are_unknown(tmp_path: Path) -> None:
    engine = on_cpus().engine
    assert isinstance(engine, DockerEngine)
    here = replace(engine, root_dir=tmp_path)
    for read in (read_disk, read_available_memory):
        assert isinstance(read(here), int)
        assert isinstance(read(replace(here, is_this_host=False)), Unknown)
        assert isinstance(read(NO_ENGINE), Unknown)
