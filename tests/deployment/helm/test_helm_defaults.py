"""`helm install` without a value is the CPU demo, whole."""

from __future__ import annotations

import yaml

from support.helm import ROOT, one, render


def test_the_defaults_run_the_digits_example() -> None:
    objects = render()
    config = yaml.safe_load(one(objects, "ConfigMap", "-config")["data"]["config.yaml"])
    assert config == yaml.safe_load((ROOT / "examples/digits/config.yaml").read_text())
    files = one(objects, "ConfigMap", "-project")["data"]
    assert files == {
        name: (ROOT / "examples/digits" / name).read_text() for name in ("prepare.py", "rewards.py")
    }
