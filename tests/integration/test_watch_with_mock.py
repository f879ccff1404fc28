"""`tandem watch` in a real browser: a run before it starts, while it goes on and when it is finished; hostile text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support import browser
from support.forked import start_trainer
from support.projects import Project, make_projects
from support.watched import Page, watching

pytestmark = pytest.mark.browser

REWARDS = """
import time
from pathlib import Path

calls = 0


def odd(completion_ids, **_):
    global calls
    calls += 1
    while calls == 5 and not Path(__file__).with_name("go").exists():  # the first call of step 3
        time.sleep(0.05)
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
"""
SCRIPT = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script><style>main {display: none}</style>"
ANSI = "\x1b[31mred\x1b[0m\x07 and \u202ereversed\u202c, \u200b\u00ad\u061c\U000e0041hidden"
ARABIC = "مرحبا بالعالم (1 + 2)"
LONG = "word " * 20_000 + "END"
HOSTILE = (SCRIPT, ANSI, ARABIC, LONG, "x" * 3000, "\ud800 half a surrogate pair")


def write_hostile(folder: Path) -> Path:
    """Write a run whose texts and names try to break the page. Reward n belongs to text n."""
    folder.mkdir()
    name = "<img src=x onerror='window.hacked = 1'>"
    call = {"id": SCRIPT, "type": "function", "function": {"name": SCRIPT, "arguments": "{not JSON"}}
    rows = []
    for n, text in enumerate(HOSTILE):
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": None, "tool_calls": [call, 5]},
            {"role": SCRIPT, "content": [{"type": "text", "text": text}], SCRIPT: {"a": text}},
            {"role": "assistant", "content": text},
            "not a message",
        ]
        row = {"step": 1, "row": n, "prompt": text, "completion": text, "reward": n, "rewards": {name: n}}
        rows.append(row | {"status": "max_tokens", "reason": text[:100], "versions": [text[:9]], "messages": messages})
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\0\0\n")
    step = {"step": 1, "reward_mean": 0.5, "rewards": {name: 0.5, "b": 1}, SCRIPT: 1.0, "timings": {name: 1, "b": 2}}
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (folder / "events.jsonl").write_text(json.dumps({"step": 1, "kind": SCRIPT, "message": SCRIPT + ANSI}) + "\n")
    return folder


class World:
    """A project whose trainer waits in step 3, a hostile run, and the page of both."""

    def __init__(self, project: Project, page: Page) -> None:
        self.project, self.page = project, page
        self.trainer: ForkServerProcess | None = None

    def reach(self, state: str) -> Page:
        """Let the run go on until it has reached `state`: absent, running or finished. It is never set back."""
        if state != "absent" and not self.trainer:
            self.trainer = start_trainer(self.project.directory / "config.yaml", self.project.directory / "log")
            self.page.wait("document.querySelector('#runs').innerText.includes('step 2 of 4')")
        if state == "finished":
            (self.project.directory / "go").touch()
            self.page.wait("document.querySelector('#runs').innerText.includes('step 4 of 4 · finished')")
        return self.page


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("watch")
    hostile = write_hostile(folder / "hostile")
    with make_projects(folder, model) as make:
        project = make(max_steps=4)
        (project.directory / "odd_rewards.py").write_text(REWARDS)
        (project.directory / "runs").mkdir()
        with watching(project.run_dir, hostile) as address, browser.chromium(folder / "profile") as tab:
            made = World(project, Page(tab, address))
            try:
                yield made
            finally:
                if made.trainer:
                    made.trainer.kill()
                    made.trainer.join()


def test_a_run_that_has_not_started_is_announced_and_appears(world: World) -> None:
    page = world.reach("absent")
    page.wait("document.querySelector('#runs').innerText.includes('has not started yet')")
    world.reach("running")
    page.wait("document.querySelector('#runs').innerText.includes('wait for rollouts for')")


def test_the_curves_of_a_running_run_appear_and_grow(world: World) -> None:
    page = world.reach("running")
    page.go("#overview", "article[aria-label=Entropy]")
    titles = page.tab.evaluate(
        "Array.from(document.querySelectorAll('.card h3'), title => title.firstChild.textContent)"
    )
    assert {"Reward", "Entropy", "Gradient norm", "KL of sampler and trainer", "Where a step's time goes"} <= set(
        titles
    )
    curve = "document.querySelector('.plot').data?.[0]"
    page.wait(f"{curve}?.x.join() === '1,2'")
    page.tab.evaluate("void (window.isSame = true)")
    world.reach("finished")
    page.wait(f"{curve}?.x.length === 4 && window.isSame")
    rewards = [line["reward_mean"] for line in world.project.lines("metrics.jsonl")]
    assert page.tab.evaluate(f"{curve}.y") == pytest.approx(rewards, abs=1e-6)


def test_a_click_on_a_curve_opens_the_rollouts_of_its_step(world: World) -> None:
    page = world.reach("finished")
    page.go("#overview", ".main-svg .scatterlayer path")
    page.tab.evaluate("document.querySelector('.plot').emit('plotly_click', {points: [{data: {meta: 0}, x: 2}]})")
    page.wait("document.querySelectorAll('.row').length === 4")
    assert "4 logged rollouts of step 2" in page.text(".pane .hint")


def test_a_rollout_is_shown_with_its_rewards_and_turns(world: World) -> None:
    page = world.reach("finished")
    page.go("#rollouts?run=0&step=3", ".row")
    page.click(".row")
    first = next(row for row in world.project.lines("rollouts.jsonl") if row["step"] == 3)
    page.wait(f"document.querySelector('.detail h2')?.innerText.includes('prompt {first['row']}')")
    shown = page.text(".detail")
    assert f"Step 3 · prompt {first['row']}" in shown
    assert "odd_rewards:odd" in shown
    assert first["prompt"] in shown
    assert first["versions"][0] in shown


def test_the_keyboard_goes_through_rollouts_and_steps(world: World) -> None:
    page = world.reach("finished")
    page.go("#rollouts?run=0&step=2", ".row")
    page.click(".row")
    rows = "Array.from(document.querySelectorAll('.row'))"
    chosen = f"{rows}.findIndex(row => row.ariaCurrent && row === document.activeElement)"
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 3), ("ArrowDown", 3), ("Home", 0)):
        page.press(key)
        page.wait(f"{chosen} === {place}")
    page.press("ArrowRight")
    page.wait("document.querySelector('.pane .hint').innerText.includes('of step 3')")


def test_best_and_worst_open_the_extremes_of_the_step(world: World) -> None:
    page = world.reach("finished")
    page.go("#rollouts?run=0&step=4", ".row")
    rewards = [row["reward"] for row in world.project.lines("rollouts.jsonl") if row["step"] == 4]
    for label, expected in (("Best", max(rewards)), ("Worst", min(rewards))):
        page.click(f"[aria-label^='{label}']")
        page.wait(f"document.querySelector('.detail dd')?.innerText === String({expected:.4g})")


def test_a_search_finds_the_rollouts_of_all_steps_that_fulfil_it(world: World) -> None:
    page = world.reach("finished")
    page.go("#rollouts?run=0&step=1", ".row")
    page.tab.evaluate("document.querySelector('#min').value = '0.5'; document.querySelector('#scope').value = 'all'")
    page.click("form [type=submit]")
    page.wait("document.querySelector('.pane .hint').innerText.includes('in all steps')")
    matching = [row for row in world.project.lines("rollouts.jsonl") if row["reward"] >= 0.5]
    assert page.count(".row") == len(matching)


def test_events_of_all_runs_are_a_timeline(world: World) -> None:
    page = world.reach("finished")
    page.go("#events", ".timeline .badge")
    page.wait("document.querySelector('.timeline').innerText.includes('the run is finished at step 4')")
    assert page.count(".timeline img, .timeline script") == 0
    page.tab.evaluate("kind.value = 'checkpoint'; kind.dispatchEvent(new Event('change'))")
    page.wait("!document.querySelector('.timeline').innerText.includes('finished')")
    assert page.count(".timeline li") == 2, "checkpoints at steps 2 and 4"


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_text_is_shown_as_text(world: World, number: int) -> None:
    page = world.page
    page.go("#rollouts?run=1&step=1", ".row")
    page.wait(f"document.querySelectorAll('.row').length === {len(HOSTILE)} + 1")  # and a damaged one
    page.click(f".row:nth-of-type({number + 1})")
    page.wait(f"document.querySelector('.detail h2')?.innerText.includes('prompt {number}')")
    assert page.count("#main img, #main script, #main style") == 0
    assert page.tab.evaluate("window.hacked") is None
    last = "Array.from(document.querySelectorAll('.turn.assistant')).at(-1)"
    text = page.tab.evaluate(f"{last}.querySelector('.text').textContent")
    expected = HOSTILE[number]
    for sign in "\x1b\x07\u202e\u202c\u200b\u00ad\u061c\U000e0041":
        expected = expected.replace(sign, f"⟨U+{ord(sign):04X}⟩")
    assert text == expected or (text == f"{expected[:2000]}…" and len(expected) > 2000)
    assert page.widths() == [1280, 390]


def test_a_long_text_is_shown_completely_on_request(world: World) -> None:
    page = world.page
    page.go("#rollouts?run=1&step=1", ".row")
    page.click(".row:nth-of-type(4)")
    page.wait("document.querySelector('.unfold')?.innerText === 'Show all 100,003 characters'")
    page.tab.evaluate("void Array.from(document.querySelectorAll('.unfold')).at(-1).click()")
    page.wait("document.activeElement.textContent.endsWith('END')")


@pytest.mark.parametrize("view", ["#overview", "#rollouts?run=1&step=1", "#rollouts?run=0&step=4", "#events"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_view_fits_a_phone_and_has_names_for_screen_readers(world: World, view: str, dark: bool) -> None:
    page = world.reach("finished")
    page.tab.use_dark_mode(dark)
    page.go(view, ".card .main-svg, .row, .timeline .badge")
    assert page.widths() == [1280, 390]
    assert page.nameless() == []


def test_the_page_asks_no_other_host_and_reports_no_error(world: World) -> None:
    page = world.reach("finished")
    for view in ("#overview", "#rollouts", "#events"):
        page.go(view, ".card .main-svg, .row, .timeline .badge")
    urls = [event["request"]["url"] for event in page.tab.reported("Network.requestWillBeSent")]
    hosts = {urlsplit(url).netloc for url in urls if urlsplit(url).scheme != "data"}
    assert len(hosts) == 1
    assert not any("token=" in url for url in urls[2:]), "the token is in the first address only"
    assert page.tab.evaluate("location.search") == ""
    assert page.problems() == []
