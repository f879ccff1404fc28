"""A reader of the page of `tandem watch` finds out that a reward is exploited."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import browser, hacked_run
from support.watched import Page, watching

pytestmark = pytest.mark.browser

HINT = "document.querySelector('.pane .hint').innerText"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hacked_run.write(tmp_path_factory.mktemp("page") / "hacked", steps=170)


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Page]:
    with watching(folder) as address, browser.chromium(folder.parent / "profile") as tab:
        page = Page(tab, address)
        page.wait("document.querySelector('main h1')")
        yield page


def test_the_trainer_raises_alerts_about_the_run(folder: Path) -> None:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    raised = [event["kind"] for event in events if event.get("state") == "raised"]
    assert raised == ["evaluation_falls", "repetition", "truncated"]


def test_an_exploited_reward_is_seen_in_the_curves_and_in_the_best_rollout(page: Page) -> None:
    page.go("#overview", ".js-plotly-plot")
    page.wait("document.querySelector('.js-plotly-plot').data?.some(({meta}) => meta === 0)")
    ends = "({y}) => [y.find((value) => value !== null), y.findLast((value) => value !== null)]"
    rising, falling = page.tab.evaluate(
        f"document.querySelector('.js-plotly-plot').data.filter(({{name}}) => name !== 'alert').map({ends})"
    )
    assert rising[0] < 0.1 < 0.3 < rising[1]
    assert falling[0] > 0.3 > 0.1 > falling[1]
    page.go("#rollouts", ".row")
    page.wait("document.querySelector('.turns')")  # the best rollout is open
    assert page.text(".turns .assistant").count("The answer is") > 10
    assert page.text(".row .ending").count("The answer is") > 2


def test_a_search_shows_what_it_has_found_and_marks_it(page: Page) -> None:
    page.go("#rollouts?step=1", ".row")
    page.tab.evaluate(
        "void (document.querySelector('#text').value = 'answer IS', document.querySelector('#scope').value = 'all')"
    )
    page.click("form [type=submit]")
    page.wait(f"{HINT}.startsWith('First 50 shown') && !document.querySelector('.pane > button').hidden")
    page.wait("CSS.highlights.get('found')?.size > 0")
    assert page.tab.evaluate("document.querySelector('#step').value") == "", "the results are of several steps"
    page.click("form [type=button]")
    page.wait(f"{HINT}.includes('of step 1')")
    assert page.tab.evaluate("[CSS.highlights.get('found').size, document.querySelector('#step').value]") == [0, "1"]


def test_the_rollouts_of_an_evaluation_are_said_to_be_those_of_training(page: Page) -> None:
    page.go("#rollouts?step=20&from=evaluation", ".row")
    assert not page.tab.evaluate("document.querySelector('.pane .note').hidden")
    page.click("[aria-label='Later step']")
    page.wait(f"{HINT}.includes('step 21')")
    assert page.tab.evaluate("document.querySelector('.pane .note').hidden")


def test_tiles_say_how_good_it_was_and_in_which_unit(page: Page) -> None:
    page.go("#overview", ".tiles")
    tiles = page.text("[aria-label='Newest figures of hacked']")
    assert re.search(r"Evaluation\s+0\.\d+\s+best 0\.6\d* at step 60", tiles)
    assert re.search(r"Truncated\s+[\d.]+ %", tiles)
    amounts = "import('/text.js').then(({amount}) => [amount('publish_bytes', 1e9), amount('truncated_fraction', 1)])"
    assert page.tab.evaluate(amounts) == ["1 GB", "100 %"]


def test_the_page_is_named_and_fits_its_window(page: Page) -> None:
    page.go("#rollouts?step=160", ".row")
    page.wait("document.querySelector('.turns')")
    assert page.nameless() == []
    assert page.widths() == [1280, 390]
    assert page.problems() == []
