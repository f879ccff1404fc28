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
SIGNS = ("<img src=x onerror='window.hacked = 1'>", "\x1b[31m", "\u202eا", "", "😀", "\n", "<|im_end|>")
"""Tokens that try to break the page. The fourth is a part of the fifth."""
LONG = 30_000
HINT = "document.querySelector('.pane .hint').innerText"


def append(file: Path, *records: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


ALERTS = (
    {"step": 1, "kind": "checkpoint_failed", "message": "of an earlier release"},
    {"step": 2, "kind": "entropy", "level": "warning", "message": "low", "page": "alerts.html#entropy-collapse"},
    {"step": 3, "kind": "lost", "level": "error", "message": "gone", "page": "javascript:alert(1)"},
    {"step": 3, "kind": "finished", "message": "done"},
)
DAMAGED_SPANS = [
    5,
    None,
    {"text": "no list"},
    {"text": [1]},
    {"text": ["a"], "sampler": [None], "versions": [[1, 1e9], 2]},
]


def spoken() -> dict[str, Any]:
    """An episode of two turns with a tool's result between them. The second turn has no trainer logprobs."""
    call = {"id": "0", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "It is 3, as a part of the text that has no logged tokens"},
    ]
    size = len(SIGNS)
    spans = [
        {
            "message": 1, "text": [*SIGNS], "sampler": [-0.5] * size, "trainer": [-1.25, *[-0.5] * (size - 2), -0.25],
            "versions": [["1.1", 2], ["2.1", size - 2]],
        },
        {"message": 3, "text": ["It", " is", " 3"], "sampler": [-0.1] * 3, "trainer": None, "versions": [["2.1", 3]]},
    ]  # fmt: skip
    return {"step": 1, "row": 0, "reward": 1, "advantage": -0.75, "tokens": 20, "messages": messages, "spans": spans}


def long() -> dict[str, Any]:
    text = [f" {n:05d}"[-4:] for n in range(LONG)]
    logprobs = [-1.0] * LONG
    span = {"message": None, "text": text, "sampler": logprobs, "trainer": logprobs, "versions": [["1.1", LONG]]}
    return {
        "step": 2,
        "row": 0,
        "reward": 1,
        "advantage": 0.5,
        "tokens": LONG,
        "completion": "".join(text),
        "spans": [span],
    }


class World:
    """A page of runs: one with many rollouts, one with none, one with damaged fields, and one that grows."""

    def __init__(self, folder: Path) -> None:
        self.full, self.without, self.odd, self.growing, self.tokens = (folder / name for name in "abcde")
        append(self.full / "metrics.jsonl", *({"step": n, "reward_mean": n / 4} for n in (1, 2, 3, 4)))
        rows = [{"step": 2, "row": n, "completion": f"number {n}", "reward": n} for n in range(ROWS)]
        others = ({"step": n, "row": 0, "completion": f"of step {n}", "reward": 1} for n in (3, 4))
        append(self.full / "rollouts.jsonl", *rows, *others)
        append(self.growing / "rollouts.jsonl", *rows[:600])
        append(self.without / "metrics.jsonl", {"step": 1, "reward_mean": 0.5})
        append(self.tokens / "metrics.jsonl", *({"step": n, "reward_mean": n, "rewards": {"r": n}} for n in (1, 2, 3)))
        append(self.tokens / "rollouts.jsonl", spoken(), long(), spoken() | {"step": 3, "spans": DAMAGED_SPANS})
        append(self.tokens / "events.jsonl", *ALERTS)
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
    runs = (made.full, made.without, made.odd, made.growing, made.tokens)
    with watching(*runs) as address, browser.chromium(folder / "t") as tab:
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


def color_by(page: Page, kind: str) -> list[str]:
    """Choose the colours of tokens. Returns the classes of the tokens of the first turn."""
    change = f"choice.value = '{kind}', choice.dispatchEvent(new Event('change'))"
    page.tab.evaluate(f"((choice) => void ({change}))(document.querySelector('#color'))")
    return list(
        page.tab.evaluate(
            "Array.from(document.querySelector('.tokens')?.querySelectorAll('span') ?? [], (one) => one.className)"
        )
    )


def test_tokens_are_coloured_and_their_numbers_are_shown(world: World) -> None:
    page = world.page
    page.go("#rollouts?run=4&step=1", ".row")
    assert "advantage −0.75" in page.text(".row")
    page.click(".row")
    page.wait("document.querySelector('#color')")
    assert page.count(".tokens") == 0
    assert color_by(page, "gap") == ["down3", *["same"] * 2, "same part", *["same"] * 2, "up2"]
    assert color_by(page, "advantage")[0] == "down2"
    assert color_by(page, "version") == [*["version0"] * 2, "version1", "version1 part", *["version1"] * 3]
    assert "version 1.1" in page.text(".coloring .legend")
    page.tab.evaluate("void document.querySelector('.tokens').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.press(key)
    for shown in ("token 1 of 7", "sampler −0.5000", "trainer −1.2500", "gap −0.75", "advantage −0.75", "version 1.1"):
        assert shown in page.text(".readout")
    page.press("End")
    assert "<|im_end|>" in page.text(".readout")
    assert page.nameless() == []
    assert page.widths() == [1280, 390]


def test_tokens_are_text_and_the_conversation_stays_readable(world: World) -> None:
    page = world.page
    page.go("#rollouts?run=4&step=1", ".row")
    page.click(".row")
    page.wait("document.querySelector('#color')")
    color_by(page, "gap")
    assert page.text(".turns").count("three") == 1
    first, second = (page.text(f".turns .turn:nth-child({n})") for n in (2, 4))
    assert SIGNS[0] in first and "⟨U+001B⟩[31m⟨U+202E⟩ا·😀↵" in first and "calls add" in first  # noqa: PT018 - one text
    assert second.replace("\n", " ").endswith("It is 3 , as a part of the text that has no logged tokens")
    assert "Only the first 10 of 20 tokens" in page.text(".coloring")
    assert page.tab.evaluate("typeof window.hacked") == "undefined"
    assert color_by(page, "none") == []
    assert "It is 3, as a part" in page.text(".turns")
    page.go("#rollouts?run=4&step=3", ".row")
    page.click(".row")
    page.wait("document.querySelector('.detail h2')?.innerText.includes('Step 3')")
    page.go("#rollouts?run=0&step=4", ".row")
    page.click(".row")
    page.wait("document.querySelector('.detail h2')?.innerText.includes('Step 4')")
    assert page.count("#color") == 0, "a file of an earlier release has no tokens"
    assert page.problems() == []


def test_a_very_long_completion_is_shown_in_parts(world: World) -> None:
    page = world.page
    page.go("#rollouts?run=4&step=2", ".row")
    page.click(".row")
    page.wait("document.querySelector('.detail h2')?.innerText.includes('Step 2')")
    color_by(page, "gap")
    assert page.count(".tokens span") == 2000
    page.click(".tokens + .unfold")
    page.wait(f"document.querySelectorAll('.tokens span').length === {LONG}")


def test_events_have_levels_and_alerts_are_marked_in_the_charts(world: World) -> None:
    page = world.page
    page.go("#events", ".timeline .badge")
    assert [page.count(f".timeline .{level}") for level in ("error", "warning")] == [1, 3]
    assert "docs/train/alerts.md, “entropy collapse”" in page.text(".timeline .hint")
    assert "javascript" not in page.text(".timeline")
    change = "choice.value = 'error', choice.dispatchEvent(new Event('change'))"
    page.tab.evaluate(f"((choice) => void ({change}))(document.querySelector('#level'))")
    assert page.text(".timeline").split() == ["✕", "error", "step", "3", "lost", "e", "gone"]
    assert page.nameless() == []
    page.go("#overview", ".js-plotly-plot")
    page.wait("document.querySelector('.js-plotly-plot').data?.some(({name}) => name === 'alert')")
    marks = "document.querySelector('.js-plotly-plot').data.filter(({name, meta}) => name === 'alert' && meta === 4)"
    assert page.tab.evaluate(f"{marks}.map(({{x, text}}) => [x, text])") == [
        [[1, 2, 3], ["checkpoint failed", "entropy", "lost"]]
    ]


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
