"""The doctor's checks: each passes on a machine that can run the stack, and each refuses some faulty machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from support.facts import GIB, QWEN, UUIDS, a_stack, an_image, changed, on_cpus, on_gpus, settings
from tandem_cli.doctor.checks import CHECKS, GPU_CHECKS, examine
from tandem_cli.doctor.checks.images import REVISION
from tandem_cli.doctor.facts import (
    Access,
    Devices,
    DockerEngine,
    Gpu,
    MachineFacts,
    Nvidia,
    Port,
    Process,
    Stack,
    Volume,
)
from tandem_cli.doctor.finding import Finding
from tandem_cli.doctor.unknown import Refused, Unknown

LAPTOP, GPUS = on_cpus(), on_gpus()
ANOTHER_REVISION = replace(an_image("trainer"), labels={REVISION: "0000000"})
NO_ENGINE = Unknown("no Docker engine answers", "start it", "connection refused")


def with_process(facts: MachineFacts, pid: int) -> MachineFacts:
    """Return the facts with a process on GPU 4."""
    assert isinstance(facts.nvidia, Nvidia)
    gpus = (*facts.nvidia.gpus[:4], Gpu(4, UUIDS[4], 80 * GIB, (Process(pid, "python", 3 * GIB),)))
    return replace(facts, nvidia=replace(facts.nvidia, gpus=(*gpus, *facts.nvidia.gpus[5:])))


def with_engine(facts: MachineFacts, **changes: Any) -> MachineFacts:
    assert isinstance(facts.engine, DockerEngine)
    return replace(facts, engine=replace(facts.engine, **changes))


def with_driver(facts: MachineFacts, *cuda: int) -> MachineFacts:
    assert isinstance(facts.nvidia, Nvidia)
    return replace(facts, nvidia=replace(facts.nvidia, cuda=(cuda[0], cuda[1])))


def with_size(facts: MachineFacts, size: str, created: str | None = None) -> MachineFacts:
    """Return the facts with another size of the weight store. `created`: the size that the volume was created with."""
    assert isinstance(facts.stack, Stack)
    volume = Volume("tandem_weights", {"size": size}, {"size": created} if created else None)
    return replace(facts, stack=replace(facts.stack, volumes={"weights": volume}))


REFUSED: list[tuple[str, MachineFacts, str]] = [
    (
        "weight store",
        with_size(LAPTOP, "1g", created="1m"),
        "got 1.0 MiB (tandem_weights was created with this size; 1.0 GiB is configured now)",
    ),
    ("engine", replace(LAPTOP, engine=NO_ENGINE), "no Docker engine answers: connection refused"),
    ("engine", with_engine(LAPTOP, version="24.0.7"), "24.0.7, expected 25.0"),
    ("compose", replace(LAPTOP, compose_version="v2.23.3-desktop.2"), "2.23.3-desktop.2, expected 2.24"),
    ("compose", replace(LAPTOP, compose_version=Unknown("docker compose does not run", "install it")), "not run"),
    (
        "configuration",
        replace(LAPTOP, stack=Unknown("docker compose config fails", "fix it", "line 3")),
        "fails: line 3",
    ),
    (
        "project",
        replace(LAPTOP, settings=Refused("the project cannot be read", "fix it", "no config.yaml")),
        "config.yaml",
    ),
    (
        "images",
        replace(
            changed(LAPTOP, "trainer", is_built=False), images={**LAPTOP.images, "trainer": Unknown("is not there")}
        ),
        "tandem-trainer:cpu: this engine does not have it",
    ),
    (
        "image versions",
        replace(LAPTOP, images={**LAPTOP.images, "trainer": ANOTHER_REVISION}),
        "got generator 4f5c2a1 and trainer 0000000",
    ),
    ("CPU sets", changed(LAPTOP, "trainer", cpuset="3-7"), "got generator 0-3 and trainer 3-7, which share 3"),
    ("CPU sets", changed(LAPTOP, "trainer", cpuset="4-9"), "got CPU 8, 9, expected CPUs of this host: 0-7"),
    ("CPU sets", changed(LAPTOP, "trainer", cpuset="4-"), "got the devices '4-'"),
    (
        "GPU access",
        with_engine(GPUS, has_nvidia_toolkit=False),
        "expected an engine that has NVIDIA's container toolkit",
    ),
    ("GPU access", changed(GPUS, "trainer", devices=(Devices("cdi", ("nvidia.com/gpu=4",)),)), "CDI is off"),
    (
        "GPU ids",
        changed(GPUS, "trainer", devices=(Devices("nvidia", ("4", "8")),)),
        "got GPU 8, expected devices from this list: 0, 1, 2",
    ),
    ("GPU ids", changed(GPUS, "trainer", devices=(Devices("nvidia", count=9),)), "got GPU 8"),
    (
        "GPU ids",
        with_engine(
            changed(GPUS, "trainer", devices=(Devices("cdi", ("nvidia.com/gpu=4",)),)),
            cdi_devices=frozenset({"nvidia.com/gpu=0"}),
        ),
        "got GPU nvidia.com/gpu=4",
    ),
    ("GPU sets", changed(GPUS, "trainer", devices=(Devices("nvidia", ("1", "2")),)), "share 1"),
    ("GPU sets", changed(GPUS, "trainer", devices=(Devices("nvidia", (UUIDS[4], UUIDS[0])),)), "share 0"),
    ("GPU sets", changed(GPUS, "trainer", devices=(Devices("nvidia", count=1),)), "share 0"),
    ("GPU sets", changed(GPUS, "trainer", devices=(Devices("cdi", ("nvidia.com/gpu=1",)),)), "share 1"),
    ("GPU sets", changed(GPUS, "trainer", devices=(Devices("cdi", ("nvidia.com/gpu=all",)),)), "share 0, 1"),
    ("GPU sets", changed(GPUS, "trainer", devices=(Devices("nvidia", count=-1),)), "share 0, 1"),
    ("GPU sets", changed(GPUS, "trainer", devices=(Devices("nvidia", ("4", UUIDS[4])),)), f"repeats {UUIDS[4]}"),
    ("GPU use", with_process(GPUS, 4711), "GPU 4: pid 4711 (python, 3.0 GiB)"),
    ("GPU driver", with_driver(GPUS, 11, 8), "with CUDA 11.8, expected CUDA 12.8 or newer for the generator's image"),
    (
        "processes",
        changed(LAPTOP, "trainer", env={"TANDEM_TRAINER_PROCESSES": "3"}),
        "got 3 trainer processes for the 16",
    ),
    ("processes", changed(LAPTOP, "trainer", env={"TANDEM_TRAINER_PROCESSES": "two"}), "got two trainer processes"),
    ("model", replace(LAPTOP, model=Refused("the model is not known", "fix it", "the hub answers 401")), "401"),
    ("generator fits", replace(GPUS, model=replace(QWEN, parameters=100_000_000_000)), "100.00 B × 2 B / 2"),
    ("trainer fits", replace(GPUS, model=replace(QWEN, parameters=7_615_616_512)), "7.62 B × 16 B = 113.5 GiB"),
    ("trainer fits", replace(LAPTOP, model=QWEN), "got 16.0 GiB of memory, expected at least"),
    ("weight store", replace(LAPTOP, model=QWEN), "got 1.0 GiB, expected at least 4 versions × 5.8 GiB = 23.0 GiB"),
    ("weight store", with_size(LAPTOP, "much"), "got 'much' as the size of the volume tandem_weights"),
    (
        "host memory",
        with_engine(LAPTOP, memory_bytes=2 * GIB),
        "got 2.0 GiB, expected at least 1.0 GiB tmpfs + 2.0 GiB shm",
    ),
    ("host memory", replace(LAPTOP, settings=settings()), "GiB services"),
    (
        "disk",
        replace(GPUS, disk_free_bytes=50 * GIB),
        "got 50.0 GiB free, expected at least 3 checkpoints × 17.3 GiB = 51.8",
    ),
    ("weights access", changed(LAPTOP, "trainer", mounts=()), "got /weights from no volume in the trainer"),
    (
        "weights access",
        changed(LAPTOP, "generator", user="1000:1000"),
        "got user 1000 for the generator, expected 10001",
    ),
    (
        "weights access",
        replace(LAPTOP, access=Access("PermissionError", None)),
        "trainer cannot write the weights: Perm",
    ),
    ("weights access", replace(LAPTOP, access=Access(None, "PermissionError")), "generator cannot read the weights"),
    ("ports", changed(LAPTOP, "generator", ports=(Port("0.0.0.0", 8000, "taken"),)), "port 8000"),
]


def judge(name: str, facts: MachineFacts) -> Finding:
    return next(finding for finding in examine(facts) if finding.name == name)


@pytest.mark.parametrize("facts", [LAPTOP, GPUS], ids=["CPUs", "GPUs"])
def test_a_machine_that_can_run_the_stack_passes_every_check(facts: MachineFacts) -> None:
    assert {finding.name: finding.message for finding in examine(facts) if finding.status != "ok"} == {}


@pytest.mark.parametrize(("name", "facts", "words"), REFUSED, ids=[f"{n}: {w}" for n, _, w in REFUSED])
def test_a_failed_check_has_a_fix(name: str, facts: MachineFacts, words: str) -> None:
    finding = judge(name, facts)
    assert finding.status == "fail"
    assert words in finding.message
    assert finding.fix


def test_every_check_has_a_case_that_fails() -> None:
    assert {name for name, *_ in REFUSED} == CHECKS.keys()


WARNED: list[tuple[str, MachineFacts, str]] = [
    ("images", replace(LAPTOP, images={**LAPTOP.images, "trainer": Unknown("is not there")}), "not built yet"),
    (
        "image versions",
        replace(LAPTOP, images={name: replace(an_image(name), labels={}) for name in LAPTOP.images}),
        "generator and trainer has no revision label",
    ),
    (
        "image versions",
        replace(LAPTOP, images={**LAPTOP.images, "trainer": replace(an_image("trainer"), labels={})}),
        "the image of trainer has no revision label",
    ),
    ("CPU sets", changed(LAPTOP, "trainer", cpuset=""), "got no CPU set for trainer"),
    ("host memory", with_size(LAPTOP, "much"), "not checked: got 'much'"),
    ("trainer fits", changed(GPUS, "trainer", devices=(Devices("nvidia", ("MIG-1",)),)), "lists none of the trainer's"),
    ("generator fits", replace(LAPTOP, settings=settings()), "vLLM takes 0.92 of all memory"),
    ("trainer fits", with_engine(LAPTOP, memory_bytes=64 << 20), "tight"),
    (
        "weight store",
        with_size(LAPTOP, "2g", created="1g"),
        "of 1.0 GiB (tandem_weights was created with this size; 2.0 GiB is",
    ),
    ("GPU driver", with_driver(GPUS, 12, 4), "with CUDA 12.4, expected CUDA 12.8 or newer"),
    (
        "GPU driver",
        replace(GPUS, images={name: an_image(name) for name in GPUS.images}),
        "does not state its CUDA version",
    ),
    ("model", replace(LAPTOP, model=Unknown("the model is not known", "", "prepare.py has not run")), "prepare.py"),
    ("host memory", replace(LAPTOP, available_bytes=GIB), "1.0 GiB are free now"),
    ("ports", changed(LAPTOP, "generator", ports=(Port("0.0.0.0", 80, Unknown("not ours to try")),)), "not ours"),
]


@pytest.mark.parametrize(("name", "facts", "words"), WARNED, ids=[f"{n}: {w}" for n, _, w in WARNED])
def test_a_doubt_gives_a_warning(name: str, facts: MachineFacts, words: str) -> None:
    finding = judge(name, facts)
    assert finding.status == "warn"
    assert words in finding.message


ALLOWED: list[tuple[str, MachineFacts]] = [
    ("GPU use", replace(with_process(GPUS, 4711), own_pids=frozenset({4711}))),
    ("ports", changed(LAPTOP, "generator", ports=(Port("0.0.0.0", 8000, "own"),))),
    ("CPU sets", changed(GPUS, "trainer", cpuset="")),
    ("GPU driver", with_driver(GPUS, 13, 0)),
]


@pytest.mark.parametrize(("name", "facts"), ALLOWED, ids=[name for name, _ in ALLOWED])
def test_the_stacks_own_ports_and_processes_and_newer_drivers_pass(name: str, facts: MachineFacts) -> None:
    assert judge(name, facts).status == "ok"


def test_without_an_engine_one_check_fails_and_dependent_checks_are_skipped() -> None:
    findings = examine(replace(LAPTOP, engine=NO_ENGINE, images={}, disk_free_bytes=NO_ENGINE, access=NO_ENGINE))
    assert [finding.name for finding in findings if finding.status == "fail"] == ["engine"]
    assert {finding.message for finding in findings if finding.status == "warn"} == {
        "not checked: no Docker engine answers"
    }
    assert {"images", "image versions", "CPU sets", "disk"} <= {f.name for f in findings if f.status == "warn"}


def test_gpu_checks_are_left_out_if_no_service_requests_a_gpu() -> None:
    assert {finding.name for finding in examine(LAPTOP)} == CHECKS.keys() - GPU_CHECKS
    assert {finding.name for finding in examine(GPUS)} == CHECKS.keys()


def test_the_required_cuda_of_an_image_is_used_if_it_has_no_cuda_version() -> None:
    images = {name: an_image(name, NVIDIA_REQUIRE_CUDA="cuda>=13.0 brand=tesla,driver>=535") for name in GPUS.images}
    assert "expected CUDA 13.0" in judge("GPU driver", replace(GPUS, images=images)).message


def test_without_nvidia_smi_gpu_ids_give_a_warning_and_gpu_sets_are_still_compared() -> None:
    blind = replace(GPUS, nvidia=Unknown("nvidia-smi does not run"))
    assert judge("GPU ids", blind).status == "warn"
    assert judge("GPU sets", blind).status == "ok"
    assert judge("GPU sets", changed(blind, "trainer", devices=(Devices("nvidia", ("0",)),))).status == "fail"


def test_cpu_sets_are_optional_for_a_gpu_stack() -> None:
    assert "any of 8 cores" in judge("CPU sets", changed(GPUS, "generator", cpuset="0-3")).message
    pinned = changed(changed(GPUS, "generator", cpuset="0-3"), "trainer", cpuset="4-7")
    assert "generator 0-3, trainer 4-7" in judge("CPU sets", pinned).message


def test_a_weight_store_on_disk_passes_without_a_size() -> None:
    stack = replace(a_stack(), volumes={})
    assert judge("weight store", replace(LAPTOP, stack=stack, model=QWEN)).status == "ok"
