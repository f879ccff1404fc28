"""Alerts and panels are over series that exist, and both services are scraped with their token."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from support.helm import CHART, ROOT, Object, names, one, render
from support.series import known, used
from support.variations import CI, OWN
from tandem_trainer.exporter import LABELS

pytestmark = pytest.mark.helm

ALL = {"monitoring": {name: {"enabled": True} for name in ("scrape", "rules", "dashboard")}}


def rules(values: dict[str, Any] = ALL) -> dict[str, Object]:
    (group,) = one(render(values), "PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def dashboard() -> Any:
    return json.loads(one(render(ALL), "ConfigMap", "-dashboard")["data"]["tandem.json"])


def test_what_is_not_asked_for_is_not_there() -> None:
    assert {kind for kind, _ in names(render())}.isdisjoint({"ServiceMonitor", "PodMonitor", "PrometheusRule"})
    assert ("ConfigMap", "run-tandem-dashboard") not in names(render())


def test_both_services_are_scraped_with_their_token_where_prometheus_looks() -> None:
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


def test_of_several_nodes_the_first_is_scraped() -> None:
    selector = one(render({**CI["multinode"], **ALL}), "PodMonitor")["spec"]["selector"]["matchLabels"]
    assert selector["batch.kubernetes.io/job-completion-index"] == "0"


def test_every_alert_is_over_series_that_exist_and_says_what_to_do() -> None:
    for name, rule in rules().items():
        series = used(rule["expr"])
        assert series, name
        assert all(map(known, series)), (name, series)
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_the_alerts_that_matter_are_there_with_the_values_bounds() -> None:
    values = {
        **OWN,
        "project": {"configMap": "mine"},
        "monitoring": {"rules": {"enabled": True, "noStepMinutes": 7, "volumeFullPercent": 75, "klSamplerMax": 0.02}},
    }
    values = {**values, "config": {"trainer": {"max_lag": 3}}}
    found = rules(values)
    assert found["TandemNoStep"]["for"] == "7m"
    assert found["TandemLagOverBound"]["expr"].endswith("> 3")
    assert found["TandemSamplerDisagrees"]["expr"].endswith("> 0.02")
    assert found["TandemVolumeNearlyFull"]["expr"].endswith("> 0.75")
    assert "run-tandem-weights|run-tandem-runs" in found["TandemVolumeNearlyFull"]["expr"]
    assert {"TandemGeneratorNotReady", "TandemTrainerFailed", "TandemSwitchesFail"} <= found.keys()
    assert all('namespace="rl"' in rule["expr"] for rule in found.values()), (
        "another release's series are not this one's"
    )


def test_the_runbook_says_what_to_do_at_every_alert() -> None:
    told = set(re.findall(r"(?m)^\| `(Tandem\w+)`", (ROOT / "docs/deploy/runbook.md").read_text()))
    assert told == rules().keys()


def test_every_panel_is_over_series_that_exist() -> None:
    panels = dashboard()["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels) >= 10
    for panel in panels:
        for target in panel["targets"]:
            series = used(target["expr"])
            assert series, panel["title"]
            assert all(map(known, series)), (panel["title"], series)


def test_a_series_that_does_not_exist_is_noticed() -> None:
    assert used('sum by (pod) (rate(tandem_nothing_total{a="b"}[5m])) > 0.5') == {"tandem_nothing_total"}
    assert used("tandem_ready == 0 or up == 0") == {"tandem_ready", "up"}
    assert not known("tandem_nothing_total")
    assert not known("tandem_ready_total_total")
    assert known("tandem_rollout_tokens_total")
    assert known("tandem_switch_seconds_bucket")


def test_the_dashboard_is_found_by_grafanas_sidecar() -> None:
    assert one(render(ALL), "ConfigMap", "-dashboard")["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard()["uid"] == "tandem"
    assert json.loads((CHART / "files/dashboard.json").read_text()) == dashboard()


def test_labels_of_the_trainers_series_are_those_that_the_panels_name() -> None:
    legends = " ".join(t["legendFormat"] for panel in dashboard()["panels"] for t in panel["targets"])
    assert {f"{{{{{label}}}}}" for label in LABELS.values()} <= set(re.findall(r"\{\{\w+\}\}", legends))
