"""The page of `tandem watch` in a real browser, for runs whose files are already there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import browser
from support.watched import Page, watching

pytestmark = pytest.mark.browser

ROWS = 1100
"""Rollouts of step 2: more than two answers of the server have."""
HINT = "document.querySelector('.pane .hint').innerText"


def append(file: Path, *records: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


class World:
    """A page of runs: one with many rollouts, one with none, one with damaged fields, and one that grows."""

    def __init__(self, folder: Path) -> None:
        self.full, self.without, self.odd, self.growing = (folder / name for name in ("a", "b", "c", "d"))
        append(self.full / "metrics.jsonl", *({"step": n, "reward_mean": n / 4} for n in (1, 2, 3, 4)))
        rows = [{"step": 2, "row": n, "completion": f"number {n}", "reward": n} for n in range(ROWS)]
        others = ({"step": n, "row": 0, "completion": f"of step {n}", "reward": 1} for n in (3, 4))
        append(self.full / "rollouts.jsonl", *rows, *others)
        append(self.growing / "rollouts.jsonl", *rows[:600])
        append(self.without / "metrics.jsonl", {"step": 1, "reward_mean": 0.5})
        append(self.odd / "metrics.jsonl", {"reward_mean": 0.5})
        append(self.odd / "events.jsonl", {"step": 1, "kind": "odd", "message": "odd", "time_unix_s": 1e99})

    def open(self, tab: browser.Browser, address: str) -> World:
        self.page = Page(tab, address)
        self.page.wait("document.querySelector('main h1')")
        return self


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("page")
    made = World(folder)
    with watching(made.full, made.without, made.odd, made.growing) as address, browser.chromium(folder / "t") as tab:
        yield made.open(tab, address)


@pytest.mark.parametrize(
    ("title", "fields"),
    [
        ("Reward", {"reward_mean": "training", "eval.reward_mean": "evaluation"}),
        ("Reward by function", {"rewards.rewards:match": "rewards:match"}),
        ("Reward by function", {"rewards/match/mean": "match"}),
        ("Evaluation by function", {"eval.rewards.match": "match", "eval.eval_rewards/match/mean": "match"}),
        ("Pass at k", {"eval.pass_at.match.4": "match.4"}),
        ("Implicit rewards of pairs", {"rewards/margins": "margin", "rewards/chosen": "preferred"}),
        ("Pairs in the right order", {"rewards/accuracies": "share"}),
        ("Where a step's time goes", {"timings.wait_for_rollouts_s": "wait for rollouts"}),
        ("Publishing a version", {"publish_timings.write_s": "write", "publish_timings.total_s": "total"}),
        ("Size of a version", {"publish_bytes": "size"}),
        ("Age of tokens", {"staleness.0": "age 0", "staleness.1": "age 1"}),
        ("step_time", {"step_time": "step_time"}),
        ("reward_margin", {"reward_margin": "reward_margin"}),
        ("my_rewards/a/std", {"my_rewards/a/std": "my_rewards/a/std"}),
        ("eval.eval_a_reward", {"eval.eval_a_reward": "eval.eval_a_reward"}),
    ],
    ids=str,
)
def test_each_figure_has_its_chart(world: World, title: str, fields: dict[str, str]) -> None:
    assert charts(world.page, *fields) == [(title, fields)]


def test_figures_that_make_no_curve_have_no_chart(world: World) -> None:
    names = ("step", "max_steps", "attempt", "reward", "checkpoint_failures", "rewards_std.a", "rewards/a/std")
    assert charts(world.page, *names, "eval.step", "eval.n", "eval.attempt", "eval.eval_reward") == []


def charts(page: Page, *names: str) -> list[tuple[str, dict[str, str]]]:
    found = page.tab.evaluate(
        f"import('/figures.js').then(({{chartsOf}}) => chartsOf({list(names)}).flatMap(({{charts}}) => "
        "charts.map(({title, fields}) => [title, fields])))"
    )
    return [tuple(one) for one in found]


def test_all_rollouts_of_a_large_step_can_be_shown_and_the_next_step_follows(world: World) -> None:
    page = world.page
    page.go("#rollouts?run=0&step=2", ".row")
    for shown in (500, 1000):
        page.wait(f"document.querySelectorAll('.row').length === {shown}")
        page.click(".pane > button")
    page.wait(f"document.querySelectorAll('.row').length === {ROWS}")
    assert page.tab.evaluate("document.querySelector('.pane > button').hidden")
    assert f"{ROWS:,} logged rollouts of step 2" in page.text(".pane .hint")
    page.click("[aria-label='Later step']")
    page.wait(f"{HINT}.includes('1 logged rollout of step 3')")


def test_what_is_shown_of_a_large_step_stays_while_it_grows(world: World) -> None:
    page = world.page
    page.go("#rollouts?run=3&step=2", ".row")
    page.click(".pane > button")
    page.wait("document.querySelectorAll('.row').length === 600")
    append(world.growing / "rollouts.jsonl", {"step": 2, "row": 600, "completion": "new", "reward": 1})
    page.wait("document.querySelectorAll('.row').length === 601")


def test_a_run_without_rollouts_shows_none_of_another_run(world: World) -> None:
    page = world.page
    page.go("#rollouts?run=0&step=4", ".row")
    page.click(".row")
    page.wait("document.querySelector('.detail h2')")
    change = "run.value = '1', run.dispatchEvent(new Event('change'))"
    page.tab.evaluate(f"((run) => void ({change}))(document.querySelector('[aria-label=Run]'))")
    page.wait(f"{HINT}.includes('No rollouts are logged yet')")
    assert (page.count(".row"), page.count(".detail h2")) == (0, 0)
    assert page.tab.evaluate("[location.hash, document.querySelector('#step').value]") == ["#rollouts?run=1", ""]
    page.tab.evaluate("void (document.querySelector('#min').value = '0')")
    for button in ("form [type=submit]", "form [type=button]"):
        page.click(button)
    page.wait(f"{HINT}.includes('No rollouts are logged yet')")
    asked = [event["request"]["url"] for event in page.tab.reported("Network.requestWillBeSent")]
    assert not any("undefined" in url or "/1/search" in url for url in asked)


def test_damaged_fields_and_unknown_addresses_do_not_end_the_news(world: World) -> None:
    page = world.page
    page.go("#constructor", "article")
    page.go("#events", ".timeline .badge")
    append(world.odd / "events.jsonl", {"step": 2, "kind": "later", "message": "the news"})
    page.wait("document.querySelector('.timeline').innerText.includes('the news')")
    assert page.problems() == []


def test_an_error_of_the_page_is_shown_and_does_not_end_the_news(world: World) -> None:
    page = world.page
    page.tab.evaluate("void (document.querySelector('#runs').id = 'gone')")
    page.wait("document.querySelector('#offline').innerText.includes('cannot show what the server has sent')")
    page.tab.evaluate("void (document.querySelector('#gone').id = 'runs')")
    page.wait("document.querySelector('#offline').hidden")


def test_a_closed_chart_is_freed(world: World) -> None:
    page = world.page
    page.go("#overview", ".js-plotly-plot")
    page.wait("(window.plot = document.querySelector('.js-plotly-plot'))._fullLayout")
    page.go("#events", ".timeline .badge")
    page.wait("!window.plot._fullLayout")
    assert page.problems() == []


def test_plotly_js_that_cannot_be_loaded_is_reported_and_loaded_later(world: World) -> None:
    page = world.page
    page.tab.call("Network.setCacheDisabled", cacheDisabled=True)
    page.tab.call("Network.setBlockedURLs", urls=["*plotly.min.js"])
    page.tab.evaluate("void (location.hash = '#overview')")
    page.tab.open(page.tab.evaluate("location.origin"))
    page.wait("document.querySelector('.card .notice:not([hidden])')?.innerText.includes('could not be loaded')")
    page.tab.call("Network.setBlockedURLs", urls=[])
    append(world.full / "metrics.jsonl", {"step": 5, "reward_mean": 1})
    page.wait("document.querySelector('.main-svg') && !document.querySelector('.card .notice:not([hidden])')")
