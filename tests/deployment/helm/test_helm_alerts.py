"""Each alert fires when it should and stays silent when it should: `promtool test rules` on the rendered rules."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.helm import one, render

pytestmark = [pytest.mark.helm, pytest.mark.prometheus]

TIMEOUT_S = 60.0
VALUES = {"monitoring": {"rules": {"enabled": True, "noStepMinutes": 10, "notReadyMinutes": 10}}}
TRAINER = 'namespace="rl",pod="run-tandem-trainer-0a1b2c3d-x7x7x"'
GENERATOR = 'namespace="rl",pod="run-tandem-generator-0"'
JOB = 'namespace="rl",job_name="run-tandem-trainer-0a1b2c3d"'
NODE = 'condition="Ready",status="true"'


@dataclass(frozen=True)
class Case:
    """Series with one value per minute, in promtool's notation, and whether the alert fires at a minute."""

    alert: str
    series: dict[str, str]
    minute: int
    fires: bool
    why: str

    def __str__(self) -> str:
        return f"{self.alert}: {self.why}"


STEP, KL, LAG, BOUND = (f"tandem_trainer_{name}{{{TRAINER}}}" for name in ("step", "kl_sampler", "lag_max", "max_lag"))
CHECKPOINTS = f"tandem_trainer_checkpoint_failures{{{TRAINER}}}"
RAISED = f'tandem_trainer_alerts{{{TRAINER},name="truncated"}}'
READY, UP = f"tandem_ready{{{GENERATOR}}}", f"up{{{GENERATOR}}}"
STEPS, STUCK = {STEP: "1+1x60"}, {STEP: "7x60"}
ACTIVE = {f"kube_job_status_active{{{JOB}}}": "1x60"}
FAILURES = f'tandem_switch_failures_total{{{GENERATOR},code="store"}}'
VOLUME = 'namespace="rl",persistentvolumeclaim="run-tandem-{}"'
ON_NODE = {
    f'kube_pod_info{{{TRAINER},node="a"}}': "1x60",
    f'kube_pod_info{{{GENERATOR},node="b"}}': "1x60",
}


def failed(condition: str) -> str:
    return f'kube_job_failed{{{JOB},condition="{condition}"}}'


def nodes(**ready: int) -> dict[str, str]:
    conditions = {
        f'kube_node_status_condition{{node="{name}",{NODE}}}': f"{r}x60" for name, r in {"b": 1, **ready}.items()
    }
    return {**ON_NODE, **conditions}


def usage(claim: str, used: int) -> dict[str, str]:
    labels = VOLUME.format(claim)
    return {
        f"kubelet_volume_stats_used_bytes{{{labels}}}": f"{used}x60",
        f"kubelet_volume_stats_capacity_bytes{{{labels}}}": "100x60",
    }


CASES = [
    Case("TandemNoStep", STUCK, 20, True, "the step does not change"),
    Case("TandemNoStep", STUCK, 8, False, "it has not been so for long"),
    Case("TandemNoStep", {**STEPS, **ACTIVE}, 30, False, "a trainer that makes steps"),
    Case("TandemNoStep", ACTIVE, 20, True, "the Job is active and no pod runs"),
    Case("TandemNoStep", {f"kube_job_status_active{{{JOB}}}": "0x60"}, 20, False, "the Job is complete or suspended"),
    Case("TandemNoStep", {STEP: "1+1x5 _x60", **ACTIVE}, 40, True, "its pod has vanished"),
    Case("TandemNoStep", {k.replace('"rl"', '"other"'): v for k, v in STUCK.items()}, 20, False, "another namespace"),
    Case("TandemNoStep", {k.replace("run-", "ran-"): v for k, v in STUCK.items()}, 20, False, "another release"),
    Case("TandemNodeNotReady", nodes(a=0), 10, True, "unreachable"),
    Case("TandemNodeNotReady", nodes(a=1), 10, False, "ready"),
    Case("TandemNodeNotReady", nodes(c=0), 10, False, "no pod there"),
    Case("TandemTrainerFailed", {failed("true"): "1x60"}, 1, True, "failed"),
    Case("TandemTrainerFailed", {failed("true"): "0x60"}, 1, False, "not failed"),
    Case("TandemTrainerFailed", {failed("false"): "1x60"}, 1, False, "its other condition"),
    Case("TandemGeneratorNotReady", {READY: "0x60"}, 12, True, "not ready"),
    Case("TandemGeneratorNotReady", {UP: "0x60"}, 12, True, "not reachable"),
    Case("TandemGeneratorNotReady", {READY: "0x5 1x60"}, 12, False, "ready again"),
    Case("TandemGeneratorNotReady", {READY: "1x60", UP: "1x60"}, 12, False, "ready"),
    Case("TandemSwitchesFail", {FAILURES: "_x10 1x40"}, 11, True, "the first failure creates the series"),
    Case("TandemSwitchesFail", {FAILURES: "1x20 2x40"}, 22, True, "another failure"),
    Case("TandemSwitchesFail", {FAILURES: "_x10 1x40"}, 40, False, "a failure long ago"),
    Case("TandemLagOverBound", {LAG: "4x60", BOUND: "3x60"}, 1, True, "more than max_lag"),
    Case("TandemLagOverBound", {LAG: "3x60", BOUND: "3x60"}, 1, False, "max_lag"),
    Case("TandemSamplerDisagrees", {KL: "0.2x60"}, 20, True, "high for minutes"),
    Case("TandemSamplerDisagrees", {KL: "0.01x9 0.3 0.01x60"}, 20, False, "one high value"),
    Case("TandemCheckpointFails", {CHECKPOINTS: "1x60"}, 1, True, "a failure"),
    Case("TandemCheckpointFails", {CHECKPOINTS: "1 0x60"}, 2, False, "written again"),
    Case("TandemRunAlert", {RAISED: "_x3 4x60"}, 4, True, "it was raised at step 4"),
    Case("TandemRunAlert", {RAISED: "4x5 _x60"}, 20, False, "it has ended"),
    Case("TandemRunAlert", {RAISED.replace("run-", "ran-"): "4x60"}, 4, False, "another release"),
    Case("TandemVolumeNearlyFull", usage("runs", 95), 10, True, "95 %"),
    Case("TandemVolumeNearlyFull", usage("weights", 95), 10, True, "95 % of the other claim"),
    Case("TandemVolumeNearlyFull", usage("runs", 80), 10, False, "80 %"),
    Case("TandemVolumeNearlyFull", usage("cache", 95), 10, False, "the cache can be made again"),
]  # fmt: skip


def rules() -> dict[str, Any]:
    return dict(one(render(VALUES), "PrometheusRule")["spec"])


def alert_names() -> set[str]:
    return {rule["alert"] for group in rules()["groups"] for rule in group["rules"]}


def fires(case: Case, rules: dict[str, Any], folder: Path) -> bool:
    """Whether the alert of a case fires. promtool compares with no alert, and fails if there is one."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    made = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [as_test(case)]}
    (folder / "tests.yaml").write_text(yaml.safe_dump(made))
    command = ["promtool", "test", "rules", "tests.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    fired = done.returncode != 0
    assert not fired or f'alertname="{case.alert}"' in done.stdout + done.stderr, done.stdout + done.stderr
    return fired


def as_test(case: Case) -> dict[str, Any]:
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": f"{case.minute}m", "alertname": case.alert, "exp_alerts": []}],
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_alert_fires_exactly_when_it_should(case: Case, tmp_path: Path) -> None:
    assert fires(case, rules(), tmp_path) == case.fires


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    for expected in (True, False):
        assert {case.alert for case in CASES if case.fires is expected} == alert_names()


def test_the_rules_are_valid(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    command = ["promtool", "check", "rules", "--lint-fatal", "rules.yaml"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
