"""The alerts of compose.yaml's profile `metrics`: those of the chart, with the labels that its Prometheus sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployment.helm.test_helm_alerts import TIMEOUT_S, Case, fires
from support.helm import CHART, ROOT
from support.series import known, used

sys.path.insert(0, str(ROOT / "helm"))
from make_files import ALERTS, compose_alerts

pytestmark = pytest.mark.prometheus

RULES: dict[str, Any] = yaml.safe_load(ALERTS.read_text())
(GROUP,) = RULES["groups"]
KUBERNETES = {"TandemNodeNotReady", "TandemTrainerFailed", "TandemVolumeNearlyFull"}
TRAINER = '{namespace="compose",pod="tandem-trainer-172.18.0.4"}'
GENERATOR = '{namespace="compose",pod="tandem-generator-172.18.0.3"}'
STEP, KL, LAG, BOUND, CHECKPOINTS = (
    f"tandem_trainer_{name}{TRAINER}" for name in ("step", "kl_sampler", "lag_max", "max_lag", "checkpoint_failures")
)
TRAINER_UP, GENERATOR_UP, READY = f"up{TRAINER}", f"up{GENERATOR}", f"tandem_ready{GENERATOR}"
RAISED = f"tandem_trainer_alerts{TRAINER}"
FAILURES = f"tandem_switch_failures_total{GENERATOR}"
CASES = [
    Case("TandemNoStep", {STEP: "7x60"}, 40, True, "the step does not change"),
    Case("TandemNoStep", {STEP: "1+1x60"}, 40, False, "a trainer that makes steps"),
    Case("TandemNoStep", {STEP: "1+1x5 _x60"}, 55, False, "the run is over"),
    Case("TandemGeneratorNotReady", {READY: "0x60", TRAINER_UP: "1x60"}, 20, True, "not ready"),
    Case("TandemGeneratorNotReady", {GENERATOR_UP: "0x60", TRAINER_UP: "1x60"}, 20, True, "the trainer goes on"),
    Case("TandemGeneratorNotReady", {GENERATOR_UP: "0x60", TRAINER_UP: "0x60"}, 20, False, "the run is over"),
    Case("TandemGeneratorNotReady", {READY: "1x60", GENERATOR_UP: "1x60"}, 20, False, "ready"),
    Case("TandemSwitchesFail", {FAILURES: "_x10 1x40"}, 11, True, "the first failure creates the series"),
    Case("TandemSwitchesFail", {FAILURES: "_x10 1x40"}, 40, False, "a failure long ago"),
    Case("TandemLagOverBound", {LAG: "4x60", BOUND: "3x60"}, 1, True, "more than max_lag"),
    Case("TandemLagOverBound", {LAG: "3x60", BOUND: "3x60"}, 1, False, "max_lag"),
    Case("TandemSamplerDisagrees", {KL: "0.2x60"}, 20, True, "high for minutes"),
    Case("TandemSamplerDisagrees", {KL: "0.01x60"}, 20, False, "low"),
    Case("TandemCheckpointFails", {CHECKPOINTS: "1x60"}, 1, True, "a failure"),
    Case("TandemCheckpointFails", {CHECKPOINTS: "0x60"}, 1, False, "written"),
    Case("TandemRunAlert", {RAISED: "_x3 4x60"}, 4, True, "it was raised at step 4"),
    Case("TandemRunAlert", {RAISED: "4x5 _x60"}, 20, False, "it has ended"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_alert_fires_exactly_when_it_should(case: Case, tmp_path: Path) -> None:
    assert fires(case, RULES, tmp_path) == case.fires


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    names = {rule["alert"] for rule in GROUP["rules"]}
    for expected in (True, False):
        assert {case.alert for case in CASES if case.fires is expected} == names


def test_the_file_is_written_from_the_alerts_of_the_chart_without_those_of_kubernetes_alone() -> None:
    assert ALERTS.read_text() == compose_alerts(), "run helm/make_files.py"
    lines = (CHART / "files/alerts.yaml").read_text().splitlines()
    all_names = {line.removeprefix("- alert: ") for line in lines if line.startswith("- alert:")}
    assert {rule["alert"] for rule in GROUP["rules"]} == all_names - KUBERNETES
    assert all(known(series) for rule in GROUP["rules"] for series in used(rule["expr"]))


def test_prometheus_accepts_its_configuration() -> None:
    folder = ALERTS.parent
    for words in (
        ("check", "config", "--syntax-only", "prometheus.yaml"),
        ("check", "rules", "--lint-fatal", ALERTS.name),
    ):
        made = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert made.returncode == 0, made.stdout + made.stderr
