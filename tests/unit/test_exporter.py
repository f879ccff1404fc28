"""`GET /metrics` returns the newest step of the run, and requires the token."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem_rollout.errors import UserError
from tandem_trainer.run.exporter import exported, exposition, newest

RECORD = {
    "step": 7,
    "version": "7.1",
    "reward_mean": 0.25,
    "kl_sampler": 1e-05,
    "reward_std": None,
    "clip_ratio/low_mean": 0.5,
    "rewards": {"rewards:exact_match": 0.25, "rewards:none": None},
    "timings": {"update_s": 1.5},
    "publish_timings": {"write_s": 0.5},
}


def scraped(text: str) -> dict[str, float]:
    """Parse `text` with the parser of Prometheus, and return `name{label=value}` → value."""
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def get(port: int, path: str, token: str | None) -> str:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_every_number_of_a_step_is_a_gauge_and_none_is_left_out() -> None:
    assert scraped(exposition(RECORD)) == {
        "tandem_trainer_step": 7,
        "tandem_trainer_reward_mean": 0.25,
        "tandem_trainer_kl_sampler": 1e-05,
        "tandem_trainer_clip_ratio_low_mean": 0.5,
        "tandem_trainer_rewards{'function': 'rewards:exact_match'}": 0.25,
        "tandem_trainer_timings{'phase': 'update_s'}": 1.5,
        "tandem_trainer_publish_timings{'phase': 'write_s'}": 0.5,
    }


def test_newest_returns_the_last_complete_step_at_any_time_of_the_run(tmp_path: Path) -> None:
    assert newest(tmp_path) == {}
    metrics, status = tmp_path / "metrics.jsonl", tmp_path / "status.json"
    metrics.write_text("")
    status.write_text('{"step": 0}')
    assert newest(tmp_path) == {"step": 0}
    metrics.write_text(
        "".join(json.dumps({**RECORD, "step": step, "filler": "x" * 100}) + "\n" for step in range(2000))
    )
    status.write_text('{"step": 1999}')
    assert newest(tmp_path)["step"] == 1999
    with metrics.open("a") as file:
        file.write('{"step": 2000, "rewa')
    assert newest(tmp_path)["step"] == 1999, "an incomplete line is ignored"


def test_a_scrape_requires_the_token(tmp_path: Path, unused_tcp_port: int) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    (tmp_path / "status.json").write_text('{"step": 8}')
    with exported(tmp_path, unused_tcp_port, "secret") as port:
        assert scraped(get(port, "/metrics", "secret"))["tandem_trainer_step"] == 8
        for path, token, status in [("/metrics", None, 401), ("/metrics", "other", 401), ("/", "secret", 404)]:
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(port, path, token)
            assert caught.value.code == status
        with pytest.raises(UserError, match="cannot be listened on"), exported(tmp_path, port, "secret"):
            pass
    with pytest.raises(UserError, match="no token is set"), exported(tmp_path, unused_tcp_port, None):
        pass
