"""`tandem gpus`: the files that it writes, the lines that it keeps, and the errors that keep it from writing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from support.gpus import NvidiaSmi
from support.stack import ROOT
from tandem_cli import gpu_inventory
from tandem_cli.__main__ import main
from tandem_cli.gpu_inventory import DevicesUnknown

UUIDS = [f"GPU-{index:08x}-c1d2" for index in range(8)]


class Overriding(yaml.SafeLoader):
    """Reads compose's `!override`."""


Overriding.add_constructor("!override", lambda loader, node: loader.construct_sequence(node, deep=True))  # type: ignore[arg-type]  # all are lists

CONFIG = """\
shared: {{model: {model}}}
generator: {{}}
trainer: {{max_steps: 1, rewards: [{{function: rewards:exact}}], rollout: {{num_prompts: 8}}}}
"""


@pytest.fixture
def eight_gpus(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi.says("".join(f"GPU {index}: NVIDIA H100 (UUID: {uuid})\n" for index, uuid in enumerate(UUIDS)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tandem's compose files and the stack's default project, whose model has 6 attention heads."""
    for name in ("compose.yaml", "compose.gpu.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    model = tmp_path / "examples" / "digits" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"num_attention_heads": 6}')
    (model.parent / "config.yaml").write_text(CONFIG.format(model="model"))
    for name in ("COMPOSE_FILE", "TANDEM_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(folder: Path, generator: str, trainer: str, *more: str) -> int:
    return main(["gpus", "--generator", generator, "--trainer", trainer, "--directory", str(folder), *more])


def written(folder: Path) -> dict[str, dict[str, object]]:
    """Return the environment and the reservation of each service in the written override."""
    services = yaml.load((folder / "compose.devices.yaml").read_text(), Overriding)["services"]
    return {
        name: service["environment"]
        | (service["deploy"]["resources"]["reservations"]["devices"][0] if "deploy" in service else {})
        for name, service in services.items()
    }


@pytest.mark.usefixtures("eight_gpus")
def test_each_service_gets_its_devices_and_one_rank_per_device(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "0-2", f"5,{UUIDS[7]}") == 0
    assert written(folder) == {
        "preflight": {
            "TANDEM_GENERATOR_GPUS": "0,1,2",
            "TANDEM_TRAINER_GPUS": f"5,{UUIDS[7]}",
            "TANDEM_TRAINER_PROCESSES": "2",
        },
        "generator": {
            "TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE": "3",
            "TANDEM__GENERATOR__DATA_PARALLEL_SIZE": "1",
            "driver": "nvidia",
            "device_ids": ["0", "1", "2"],
            "capabilities": ["gpu"],
        },
        "trainer": {
            "TANDEM_TRAINER_PROCESSES": "2",
            "driver": "nvidia",
            "device_ids": ["5", UUIDS[7]],
            "capabilities": ["gpu"],
        },
    }
    assert (folder / ".env").read_text() == "COMPOSE_FILE=compose.yaml:compose.gpu.yaml:compose.devices.yaml\n"
    assert capsys.readouterr().err == "", "everything could be checked"


@pytest.mark.usefixtures("eight_gpus")
def test_gpus_beyond_the_tensor_parallel_size_are_data_parallel(folder: Path) -> None:
    assert run(folder, "0-3", "4", "--tensor-parallel", "2") == 0
    environment = written(folder)["generator"]
    assert environment["TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE"] == "2"
    assert environment["TANDEM__GENERATOR__DATA_PARALLEL_SIZE"] == "2"


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("generator", "trainer", "more", "words"),
    [
        ("0-3", "3-5", (), "got the GPUs 0, 1, 2, 3 for the generator and 3, 4, 5 for the trainer, which share 3"),
        ("0-2", UUIDS[2], (), "which share 2"),
        (f"1,{UUIDS[1]}", "2", (), f"--generator: got {UUIDS[1]}, which the list 1, {UUIDS[1]} has already named"),
        ("0", "4,4", (), "--trainer: got 4, which the list 4, 4 has already named, expected each GPU once"),
        ("0-2,1", "4", (), "--generator: got 1, which the list 0, 1, 2, 1 has already named"),
        ("0", "4-6", (), "for the 8 prompts of trainer.rollout.num_prompts, expected a number of GPUs that divides 8"),
        ("0", "4-6", (), "Fix: name 1 or 2 or 4 GPUs, or set num_prompts to a multiple of 3"),
        ("0", "7-9", (), "--trainer: got 8, 9, expected devices from this list: 0, 1, "),
        ("GPU-8932f937", "1", (), "--generator: got GPU-8932f937, expected devices from this list:"),
        ("", "1", (), "--generator: got no device"),
        ("nvidia.com/gpu=0", "1", (), "expected an index or a UUID. Fix: use --driver cdi"),
        ("0-3", "4", (), "has 6 attention heads, expected a divisor of 6. Fix: --tensor-parallel 1 or 2,"),
        ("0-2", "4", ("--tensor-parallel", "2"), "got 2 for 3 devices of the generator, expected a divisor of 3"),
        ("0-2", "4", ("--tensor-parallel", "0"), "got 0 for 3 devices"),
        ("0", "1", ("--max-steps", "4"), "got --max-steps 4, which this command does not accept"),
        ("0", "1", ("--project", "nowhere"), "nowhere/config.yaml does not exist, expected a project"),
    ],
)
def test_invalid_devices_are_refused_and_nothing_is_written(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    generator: str,
    trainer: str,
    more: tuple[str, ...],
    words: str,
) -> None:
    assert run(folder, generator, trainer, *more) == 2
    assert words in capsys.readouterr().err
    assert not (folder / ".env").exists()
    assert not (folder / "compose.devices.yaml").exists()


def test_a_folder_without_the_compose_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "0", "1") == 2
    assert "has no compose.yaml and no compose.gpu.yaml" in capsys.readouterr().err


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("inside", [".", "examples/digits"])
def test_the_files_are_written_beside_the_compose_file_above_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.chdir(folder / inside)
    assert main(["gpus", "--generator", "0", "--trainer", "1"]) == 0
    assert [file.parent for name in (".env", "compose.devices.yaml") for file in folder.rglob(name)] == [folder, folder]


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("compose", [None, "services: {web: {image: nginx}}\n", "services: [\n", ""])
def test_outside_a_checkout_nothing_is_written_and_the_checkout_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compose: str | None
) -> None:
    if compose is not None:
        (tmp_path / "compose.yaml").write_text(compose)
        (tmp_path / "compose.gpu.yaml").write_text(compose)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert main(["gpus", "--generator", "0", "--trainer", "1"]) == 2
    assert f"Fix: run this in its folder, or name it with --directory {ROOT}" in capsys.readouterr().err
    assert main(["gpus", "--generator", "0", "--trainer", "1", "--directory", str(tmp_path)]) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("nvidia_smi")
def test_checks_that_could_not_be_made_are_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "examples/digits/config.yaml").write_text(CONFIG.format(model="org/on-the-hub"))
    assert run(folder, "0-4", "5") == 0
    nvidia, model = capsys.readouterr().err.splitlines()
    assert "it was not checked whether the devices exist" in nvidia
    assert "the number of attention heads of org/on-the-hub is not known here" in model
    assert run(folder, "0", UUIDS[0]) == 0
    assert "not checked whether an index and another name mean one GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("nvidia_smi")
def test_indexes_become_cdi_names_that_the_engine_must_have(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"DiscoveredDevices": [{"Source": "cdi", "ID": f"nvidia.com/gpu={index}"} for index in range(3)]}
    monkeypatch.setattr(gpu_inventory, "engine_info", lambda: found)
    assert run(folder, "0,nvidia.com/gpu=1", "2", "--driver", "cdi") == 0
    generator = written(folder)["generator"]
    assert (generator["driver"], generator["device_ids"]) == ("cdi", ["nvidia.com/gpu=0", "nvidia.com/gpu=1"])
    assert run(folder, "0-1", "nvidia.com/gpu=1", "--driver", "cdi") == 2
    assert "share nvidia.com/gpu=1" in capsys.readouterr().err
    assert run(folder, "0,nvidia.com/gpu=0", "1", "--driver", "cdi") == 2
    assert "--generator: got nvidia.com/gpu=0, which the list" in capsys.readouterr().err
    assert run(folder, "0-1", "3", "--driver", "cdi") == 2
    assert "--trainer: got nvidia.com/gpu=3, expected devices from this list:" in capsys.readouterr().err


@pytest.mark.usefixtures("nvidia_smi")
def test_an_engine_that_does_not_answer_gives_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def engine_info() -> None:
        raise DevicesUnknown("no Docker engine answers")

    monkeypatch.setattr(gpu_inventory, "engine_info", engine_info)
    assert run(folder, "0", "1", "--driver", "cdi") == 0
    assert "no Docker engine answers, so it was not checked whether the devices exist" in capsys.readouterr().err


@pytest.mark.usefixtures("eight_gpus")
def test_other_lines_of_env_and_other_compose_files_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = folder / "examples" / "digits"
    (folder / ".env").write_text("# mine\nTANDEM_SHM_SIZE=2g\nCOMPOSE_FILE=compose.yaml:mine.yaml\nA=b")
    for _ in range(2):
        assert run(folder, "0", "1", "--project", str(project)) == 0
    assert (folder / ".env").read_text().splitlines() == [
        "# mine",
        "TANDEM_SHM_SIZE=2g",
        "A=b",
        "COMPOSE_FILE=compose.yaml:compose.gpu.yaml:compose.devices.yaml:mine.yaml",
        f"TANDEM_PROJECT={project}",
    ]


@pytest.mark.usefixtures("eight_gpus")
def test_compose_override_yaml_is_still_read(folder: Path) -> None:
    (folder / "compose.override.yaml").write_text("{}")
    assert run(folder, "0", "1") == 0
    assert (folder / ".env").read_text().endswith(":compose.devices.yaml:compose.override.yaml\n")


@pytest.mark.usefixtures("eight_gpus")
def test_the_project_comes_from_the_environment_then_env_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "config.yaml").write_text(CONFIG.format(model=folder / "model"))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 4}}))
    (folder / ".env").write_text('TANDEM_PROJECT="./other"\n')
    assert run(folder, "0-3", "4") == 0
    monkeypatch.setenv("TANDEM_PROJECT", "./examples/digits")
    assert run(folder, "0-3", "4") == 2
    assert "6 attention heads" in capsys.readouterr().err


@pytest.mark.usefixtures("eight_gpus")
def test_the_folder_of_a_trl_script_needs_no_config_yaml(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = folder / "scripts"
    scripts.mkdir()
    given = ("--project", str(scripts))
    assert run(folder, "0", "1", *given) == 2
    assert "or one with a TRL script" in capsys.readouterr().err
    (scripts / "train.py").touch()
    assert run(folder, "0-3", "4-6", *given) == 0, "the script divides its batch itself"
    assert "heads of the script's model is not known here" in capsys.readouterr().err
    (scripts / "tandem.yaml").write_text(f"shared: {{model: {folder / 'examples/digits/model'}}}")
    assert run(folder, "0-3", "4-6", *given) == 2
    assert "has 6 attention heads" in capsys.readouterr().err


@pytest.mark.usefixtures("eight_gpus")
def test_compose_file_of_the_shell_gives_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPOSE_FILE", "compose.yaml")
    assert run(folder, "0", "1") == 0
    assert "unset COMPOSE_FILE" in capsys.readouterr().err


@pytest.mark.usefixtures("eight_gpus")
def test_files_that_root_writes_belong_to_the_owner_of_the_folder(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files to another user")
    os.chown(folder, 1234, 1234)
    for _ in range(2):
        assert run(folder, "0", "1") == 0
    assert {(folder / name).stat().st_uid for name in (".env", "compose.devices.yaml")} == {1234}
