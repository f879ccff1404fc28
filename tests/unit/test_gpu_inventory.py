"""Lists devices by nvidia-smi and CDI, and says why they could not be listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.gpus import NvidiaSmi
from tandem_cli.gpu_inventory import DevicesUnknown, cdi_devices, gpu_uuids

SPEC = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [{"name": "0"}, {"name": "all"}]}


def test_nvidia_smi_gives_the_uuid_of_every_gpu_and_mig_slice(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi.says(
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5b)\n"
        "  MIG 1g.5gb      Device  0: (UUID: MIG-c7e2)\n"
        "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-0f3a)\n"
    )
    assert gpu_uuids() == {"0": "GPU-5d5b", "1": "GPU-0f3a", "MIG-c7e2": "MIG-c7e2"}


def test_a_failure_of_nvidia_smi_is_reported_with_its_reason(nvidia_smi: NvidiaSmi) -> None:
    with pytest.raises(DevicesUnknown, match=r"does not run: .*nvidia-smi"):
        gpu_uuids()
    nvidia_smi.says("couldn't communicate with the NVIDIA driver", exit_code=9)
    with pytest.raises(DevicesUnknown, match="failed: couldn't communicate"):
        gpu_uuids()


def test_an_nvidia_smi_that_hangs_times_out(nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_cli.gpu_inventory.NVIDIA_SMI_TIMEOUT_S", 0.2)
    nvidia_smi.hangs()
    with pytest.raises(DevicesUnknown, match=r"timed out after 0\.2 seconds"):
        gpu_uuids()


def test_cdi_names_come_from_the_engine_or_from_its_specifications(tmp_path: Path) -> None:
    found = [{"Source": "cdi", "ID": "nvidia.com/gpu=7"}, {"Source": "other", "ID": "x"}]
    assert cdi_devices({"DiscoveredDevices": found}) == {"nvidia.com/gpu=7"}
    (tmp_path / "nvidia.json").write_text(json.dumps(SPEC))
    (tmp_path / "more.yaml").write_text("kind: nvidia.com/gpu\ndevices: [{name: '1'}]\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "README").write_text("-")
    assert cdi_devices({"CDISpecDirs": [str(tmp_path)]}) == {f"nvidia.com/gpu={n}" for n in ("0", "1", "all")}


def test_the_error_names_the_folders_that_have_no_cdi_specification(tmp_path: Path) -> None:
    with pytest.raises(DevicesUnknown, match=f"no specification in {tmp_path}"):
        cdi_devices({"CDISpecDirs": [str(tmp_path)]})
    with pytest.raises(DevicesUnknown, match="CDI is off"):
        cdi_devices({"CDISpecDirs": None})
