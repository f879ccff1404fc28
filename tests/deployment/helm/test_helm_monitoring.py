"""Alerts and panels use metrics that exist, and Prometheus scrapes both services with their token."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from support.helm import CHART, ROOT, Object, names, one, render
from support.series import STEP, known, used
from support.variations import CI, OWN
from tandem_trainer.run.exporter import LABELS

pytestmark = pytest.mark.helm

ALL = {"monitoring": {name: {"enabled": True} for name in ("scrape", "rules", "dashboard")}}


def rules(values: dict[str, Any] = ALL) -> dict[str, Object]:
    (group,) = one(render(values), "PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def dashboard() -> Any:
    return json.loads(one(render(ALL), "ConfigMap", "-dashboard")["data"]["tandem.json"])


def test_monitoring_is_off_by_default() -> None:
    assert {kind for kind, _ in names(render())}.isdisjoint({"ServiceMonitor", "PodMonitor", "PrometheusRule"})
    assert ("ConfigMap", "run-tandem-dashboard") not in names(render())


def test_both_services_are_scraped_with_their_token_on_the_port_that_they_serve() -> None:
    objects = render(CI["gpu"])
    service = one(objects, "ServiceMonitor")
    pod = one(objects, "PodMonitor")
    credentials = {"credentials": {"name": "run-tandem-token", "key": "token"}}
    for endpoints, port in ((service["spec"]["endpoints"], "http"), (pod["spec"]["podMetricsEndpoints"], "metrics")):
        assert endpoints == [{"port": port, "path": "/metrics", "interval": "15s", "authorization": credentials}]
    for thing in (service, pod, one(objects, "PrometheusRule")):
        assert thing["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    target = one(objects, "Service", "-generator")
    assert service["spec"]["selector"]["matchLabels"].items() <= target["metadata"]["labels"].items()
    assert [port["name"] for port in target["spec"]["ports"]] == ["http"]
    (trainer,) = one(objects, "Job")["spec"]["template"]["spec"]["containers"]
    port = next(entry["value"] for entry in trainer["env"] if entry["name"] == "TANDEM__TRAINER__METRICS_PORT")
    assert trainer["ports"] == [{"name": "metrics", "containerPort": int(port)}]


def test_only_the_first_node_of_a_trainer_is_scraped() -> None:
    selector = one(render({**CI["multinode"], **ALL}), "PodMonitor")["spec"]["selector"]["matchLabels"]
    assert selector["batch.kubernetes.io/job-completion-index"] == "0"


def test_every_alert_uses_metrics_that_exist_and_has_a_description() -> None:
    for name, rule in rules().items():
        series = used(rule["expr"])
        assert series, name
        assert all(map(known, series)), (name, series)
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_the_values_set_the_thresholds_of_the_alerts() -> None:
    values = {
        **OWN,
        "project": {"configMap": "mine"},
        "monitoring": {"rules": {"enabled": True, "noStepMinutes": 7, "volumeFullPercent": 75, "klSamplerMax": 0.02}},
    }
    found = rules(values)
    assert found["TandemNoStep"]["for"] == "7m"
    assert found["TandemSamplerDisagrees"]["expr"].endswith("> 0.02")
    assert found["TandemVolumeNearlyFull"]["expr"].endswith("> 0.75")
    assert "run-tandem-weights|run-tandem-runs" in found["TandemVolumeNearlyFull"]["expr"]
    assert {"TandemGeneratorNotReady", "TandemTrainerFailed", "TandemSwitchesFail"} <= found.keys()
    assert all('namespace="rl"' in rule["expr"] for rule in found.values()), (
        "an alert must not use metrics of another release"
    )


def test_the_runbook_covers_every_alert() -> None:
    covered = set(re.findall(r"(?m)^\| `(Tandem\w+)`", (ROOT / "docs/deploy/runbook.md").read_text()))
    assert covered == rules().keys()


def test_every_panel_uses_metrics_that_exist() -> None:
    panels = dashboard()["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels) >= 10
    for panel in panels:
        for target in panel["targets"]:
            series = used(target["expr"])
            assert series, panel["title"]
            assert all(map(known, series)), (panel["title"], series)


def test_an_unknown_metric_is_detected() -> None:
    assert used('sum by (pod) (rate(tandem_nothing_total{a="b"}[5m])) > 0.5') == {"tandem_nothing_total"}
    assert used("tandem_ready == 0 or up == 0") == {"tandem_ready", "up"}
    assert not known("tandem_nothing_total")
    assert not known("tandem_ready_total_total")
    assert known("tandem_rollout_tokens_total")
    assert known("tandem_switch_seconds_bucket")


def test_the_dashboard_has_the_label_that_grafanas_sidecar_looks_for() -> None:
    assert one(render(ALL), "ConfigMap", "-dashboard")["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard()["uid"] == "tandem"
    assert json.loads((CHART / "files/dashboard.json").read_text()) == dashboard()


def test_the_panels_use_the_labels_of_the_trainers_metrics() -> None:
    legends = " ".join(t["legendFormat"] for panel in dashboard()["panels"] for t in panel["targets"])
    watched = {label for field, label in LABELS.items() if field in STEP}
    assert {f"{{{{{label}}}}}" for label in watched} <= set(re.findall(r"\{\{\w+\}\}", legends))
