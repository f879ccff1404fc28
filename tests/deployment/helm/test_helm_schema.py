"""A mistake in `config` is refused before an upgrade changes anything, with a schema from the configuration models."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

import tandem_protocol.config.generator
import tandem_protocol.config.trainer
from support.helm import CHART, ROOT, helm, refusal, render
from support.kube_api import kube_api
from support.variations import CI, OWN
from tandem_protocol.config import ConfigError, load

pytestmark = pytest.mark.helm

SCRIPT = ROOT / "helm/make_files.py"
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"trainer": {"max_step": 3}}, "at '/config/trainer': additional properties 'max_step' not allowed"),
    ({"shered": {"model": "m"}}, "at '/config': additional properties 'shered' not allowed"),
    ({"trainer": {"optim": {"lr": 1e-5}}}, "at '/config/trainer/optim': additional properties 'lr' not allowed"),
    ({"trainer": {"max_steps": "ten"}}, "at '/config/trainer/max_steps': 'ten' does not match pattern"),
    ({"trainer": {"max_steps": 1.5}}, "at '/config/trainer/max_steps': got number, want integer or string"),
    ({"trainer": {"prompts": ["a.jsonl"]}}, "at '/config/trainer/prompts': got array, want "),
    ({"trainer": {"publish": {"mode": "dran"}}}, "at '/config/trainer/publish/mode': value must be one of"),
    ({"trainer": {"rewards": [{"function": "f"}]}}, "at '/config/trainer/rewards/0/function': 'f' does not match"),
    ({"generator": {"dtype": 16}}, "at '/config/generator/dtype': got number, want string"),
]
ACCEPTED: list[dict[str, Any]] = [
    {"trainer": {"max_steps": "10", "max_lag": "0", "optim": {"learning_rate": "1e-5"}}},
    {"trainer": {"optim": None, "eval": None, "lora": None}},
    {"generator": {"vllm": {"max_num_seqs": 4, "anything": {"goes": True}}, "env": {"A": "b"}}},
    {"generator": {"max_model_len": None, "enforce_eager": "yes"}},
]


def own(changes: dict[str, Any]) -> dict[str, Any]:
    """Return a complete config.yaml with these changes."""
    base = json.loads(json.dumps(OWN["config"]))
    for section, keys in changes.items():
        base.setdefault(section, {}).update(keys)
    return dict(base)


def as_text(config: dict[str, Any]) -> dict[str, Any]:
    return {"config": yaml.safe_dump(config), "project": {"configMap": "mine"}}


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=str)
def test_a_mistake_in_the_configuration_is_refused_as_a_mapping_and_as_text(
    changes: dict[str, Any], message: str
) -> None:
    assert message in refusal({"config": changes})
    assert message in refusal(as_text(own(changes)))


@pytest.mark.parametrize(("changes", "_"), MISTAKES, ids=str)
def test_whatever_the_chart_refuses_the_services_refuse_too(changes: dict[str, Any], _: str, tmp_path: Path) -> None:
    assert not loads(own(changes), tmp_path)


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_whatever_the_services_accept_the_chart_accepts_too(changes: dict[str, Any], tmp_path: Path) -> None:
    assert loads(own(changes), tmp_path)
    render({"config": changes})
    render(as_text(own(changes)))


def loads(config: dict[str, Any], folder: Path) -> bool:
    """Do both services accept this configuration?"""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    try:
        for settings in (
            tandem_protocol.config.generator.GeneratorSettings,
            tandem_protocol.config.trainer.TrainerSettings,
        ):
            load(settings, path=path, env={})
    except ConfigError:
        return False
    return True


def test_a_key_without_default_may_only_be_missing_while_the_demo_has_it() -> None:
    render({"config": {"trainer": {"run_name": "mine"}}})
    message = refusal({"config": {"trainer": {"run_name": "mine"}}, "project": {"configMap": "mine"}})
    assert "at '/config/trainer': missing property 'max_steps'" in message
    message = refusal({"config": {"shared": {}, "trainer": {"max_steps": 1}}, "project": {"configMap": "mine"}})
    assert "at '/config/shared': missing property 'model'" in message


def test_a_typo_in_an_upgrade_leaves_the_running_job_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("shared: {model: m}\ntrainer: {max_steps: 1, max_stepz: 2}\n")
    with kube_api() as api:
        chart = (str(CHART), "--disable-openapi-validation", "--namespace", "rl", "--kube-apiserver", api.url)
        assert helm("install", "run", *chart).returncode == 0
        before = dict(api.objects)
        for typo in (
            "--set=config.trainer.max_step=3",
            f"--set-file=config={tmp_path}/config.yaml",
            "--set=replicas=2",
        ):
            made = helm("upgrade", "run", *chart, typo)
            assert (made.returncode, "not allowed" in made.stderr) == (1, True), made.stderr
        assert api.objects == before


def test_the_schema_and_the_demo_in_the_chart_are_those_of_this_version(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, str] = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({str(path.relative_to(ROOT)): text}))
    monkeypatch.setattr("shutil.copyfile", lambda of, to: written.update({str(to.relative_to(ROOT)): of.read_text()}))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    names = ("values.schema.json", "files/config.schema.json", "files/digits/config.yaml")
    assert written.keys() >= {"docker/metrics/alerts.yaml", *(f"helm/tandem/{name}" for name in names)}
    stale = [name for name, text in written.items() if (ROOT / name).read_text() != text]
    assert not stale, f"run .venv/bin/python {SCRIPT.relative_to(ROOT)}"


def test_helm_prints_nothing_besides_the_objects() -> None:
    for values in ({}, *CI.values()):
        made = helm("template", "run", CHART, "--values", "-", stdin=json.dumps(values))
        assert (made.returncode, made.stderr) == (0, "")
