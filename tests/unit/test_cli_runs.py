"""`tandem runs`: the runs of a project with their states, and a comparison, from the files of their folders."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.run_folders import GROUPS, make_run
from tandem_cli.__main__ import main
from tandem_cli.run_folder import RunFolder
from tandem_cli.run_list.chart import chart
from tandem_cli.run_list.compare import read_runs
from tandem_protocol.config import format_resolved, load
from tandem_protocol.config.project import ProjectSettings
from tandem_protocol.lock import exclusive, has_owner, shared
from tandem_protocol.run_state import LOCK_FILE

Tandem = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tandem(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tandem:
    """Run the command in `tmp_path`. Returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TANDEM_RUNS", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def step(number: int, reward: float | None, **fields: Any) -> dict[str, Any]:
    timings = {"update_s": 1.5, "other_s": 0.5}
    return {"step": number, "version": f"{number}.1", "reward_mean": reward, "rollout_tokens": 100,
            "publish_timings": {"write_s": 77.0}, "timings": timings} | fields  # fmt: skip


def make(
    folder: Path, rewards: list[float | None], phase: str = "finished", evals: dict[int, float] | None = None
) -> Path:
    folder.mkdir(parents=True)
    lines = [step(number, reward) for number, reward in enumerate(rewards, start=1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    evaluations = [{"step": at, "reward_mean": reward} for at, reward in (evals or {}).items()]
    (folder / "eval.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in evaluations))
    (folder / "status.json").write_text(json.dumps({"phase": phase, "step": len(rewards), "since_unix_s": 1.0}))
    return folder


def settings(folder: Path, **overrides: str) -> None:
    keys = {"shared.model": "m", "trainer.max_steps": "40", "trainer.rewards": '[{"function": "rewards:r"}]'}
    loaded, sources = load(ProjectSettings, overrides=keys | {k.replace("__", "."): v for k, v in overrides.items()})
    (folder / "config.resolved").write_text(format_resolved(loaded, sources))


def listed(tandem: Tandem, *words: object) -> dict[str, dict[str, Any]]:
    code, out, _ = tandem("runs", *words, "--json")
    assert code == 0
    return {run["name"]: run for run in json.loads(out)}


def test_a_run_is_listed_with_its_last_step_reward_evaluation_and_duration(tandem: Tandem, tmp_path: Path) -> None:
    rewards: list[float | None] = [9.0, *[0.1] * 5, None, *[0.3] * 4]
    folder = make(tmp_path / "runs/mine", rewards, evals={0: 0.2, 5: 0.7, 10: 0.6})
    settings(folder)
    run = listed(tandem)["mine"]
    assert run["reward"] == pytest.approx((5 * 0.1 + 4 * 0.3) / 9)  # of the last ten lines, without the None
    assert run | {"reward": None, "changed_unix_s": None} == {
        "name": "mine", "path": str(folder), "state": "finished", "phase": "finished", "step": 11, "max_steps": 40,
        "reward": None, "best_evaluation": 0.7, "best_evaluation_step": 5, "duration_s": 22.0,
        "changed_unix_s": None, "problems": [],
    }  # fmt: skip
    _, table, _ = tandem("runs")
    assert re.search(r"mine +finished +11/40 +0\.189 +0\.700 at step 5 +22 s +\d{4}-\d\d-\d\d \d\d:\d\d", table)


@pytest.mark.parametrize(("phase", "state"), [("finished",) * 2, ("stopped",) * 2, ("failed",) * 2, ("update", "dead")])
def test_a_run_whose_lock_is_held_is_running_and_another_is_what_its_status_says(
    tandem: Tandem, tmp_path: Path, phase: str, state: str
) -> None:
    folder = make(tmp_path / "runs/mine", [0.1], phase)
    assert listed(tandem)["mine"]["state"] == state
    with exclusive(folder / LOCK_FILE, "a trainer"):
        assert listed(tandem)["mine"]["state"] == "running"
    with RunFolder(folder).lock():  # `tandem demo` holds it before the trainer has started
        assert listed(tandem)["mine"]["state"] == "running"
    assert listed(tandem)["mine"]["state"] == state


def test_a_real_run_is_running_until_its_trainer_is_killed(tandem: Tandem, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    run.make_record(1, GROUPS, {"loss": 0.5})
    run.log()
    with run.timer("update"):
        code = (
            "import pathlib, time\nfrom tandem_protocol.lock import exclusive\n"
            f"with exclusive(pathlib.Path({str(run.dir / LOCK_FILE)!r}), 'x'):\n print(flush=True)\n time.sleep(600)"
        )
        trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert trainer.stdout
        trainer.stdout.readline()
        assert listed(tandem)["default"]["state"] == "running"
        trainer.kill()
        trainer.communicate()
    found = listed(tandem)["default"]
    assert (found["state"], found["phase"], found["step"]) == ("dead", "update", 1)
    assert found["reward"] == pytest.approx(0.5)


def test_a_look_at_a_lock_does_not_keep_a_trainer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / LOCK_FILE
    file.touch()
    with ExitStack() as look:
        look.enter_context(shared(file))
        monkeypatch.setattr("tandem_protocol.lock.time.sleep", lambda _: look.close())  # the look ends meanwhile
        with exclusive(file, "a trainer"):
            assert has_owner(file)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "noise": lambda folder: [
        (folder / name).write_bytes(random.Random(0).randbytes(3000))
        for name in ("metrics.jsonl", "eval.jsonl", "status.json", "config.resolved", "events.jsonl")
    ],
    "empty files": lambda folder: [(folder / name).write_bytes(b"") for name in ("metrics.jsonl", "status.json")],
    "a line without its end": lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "rew'),
    "other types": lambda folder: [
        (folder / "metrics.jsonl").write_text('[1]\n{"step": "x", "reward_mean": [1], "timings": {"a_s": "b"}}\n7\n'),
        (folder / "eval.jsonl").write_text('{"step": null, "reward_mean": 1e999}\nnull\n'),
        (folder / "status.json").write_text('{"phase": 7, "step": "many"}'),
    ],
    "a folder in place of a file": lambda folder: [
        (folder / name).mkdir() for name in ("metrics.jsonl", "eval.jsonl", "status.json", "config.resolved", LOCK_FILE)
    ],
    "numbers without an end": lambda folder: (folder / "metrics.jsonl").write_text(
        f'{{"step": 1e999, "reward_mean": {"9" * 400}, "timings": {{"update_s": 1e999}}}}\n'
    ),
    "only logs": lambda folder: (folder / "logs").mkdir(),
    "nothing": lambda folder: None,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_empty_folder_is_listed_beside_the_others(
    tandem: Tandem, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    make(tmp_path / "runs/good", [0.5])
    (tmp_path / "runs/bad").mkdir()
    damage(tmp_path / "runs/bad")
    found = listed(tandem)
    assert (found["good"]["state"], found["good"]["reward"]) == ("finished", 0.5)
    assert found["bad"]["state"] in ("unknown", "empty")
    assert found["bad"]["reward"] is None
    code, table, _ = tandem("runs")
    assert (code, "bad" in table, "good" in table) == (0, True, True)


def test_a_torn_last_line_hides_neither_the_run_nor_its_earlier_steps(tandem: Tandem, tmp_path: Path) -> None:
    folder = make(tmp_path / "runs/mine", [0.1, 0.3])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\x00\xff{"step"\n{"step": 9')
    found = listed(tandem)["mine"]
    assert (found["step"], found["reward"]) == (2, pytest.approx(0.2))
    assert found["problems"] == ["metrics.jsonl has 1 damaged lines at its end"]


def test_the_newest_run_comes_first(tandem: Tandem, tmp_path: Path) -> None:
    now_s = time.time()
    for age_s, name in ((300, "b"), (100, "c"), (200, "a")):
        for file in make(tmp_path / "runs" / name, [0.1]).iterdir():
            os.utime(file, (now_s - age_s, now_s - age_s))
    assert [*listed(tandem)] == ["c", "a", "b"]


def test_runs_are_found_from_the_project_its_runs_and_one_run(tandem: Tandem, tmp_path: Path) -> None:
    make(tmp_path / "p/runs/mine", [0.1])
    (tmp_path / "p/runs/lost+found").mkdir()
    (tmp_path / "p/runs/.mine.lock").touch()
    for folder in ("p", "p/runs", "p/runs/mine", "p/runs/../runs/mine"):
        assert [*listed(tandem, folder)] == ["mine"], folder
    assert [*listed(tandem, "list", "p")] == ["mine"]


@pytest.mark.parametrize("file", ["config.yaml", "tandem.yaml"])
def test_the_output_folder_of_the_settings_is_listed(tandem: Tandem, tmp_path: Path, file: str) -> None:
    make(tmp_path / "elsewhere/mine", [0.1])
    (tmp_path / "runs").mkdir()
    (tmp_path / file).write_text("trainer: {output_dir: elsewhere, wrong: [}")
    assert listed(tandem) == {}  # the file is not YAML, so its runs are looked for in the usual folder
    (tmp_path / file).write_text("trainer: {output_dir: elsewhere, unknown_key: 1}")
    assert [*listed(tandem)] == ["mine"]


def test_the_folder_of_the_environment_is_listed_without_an_argument(
    tandem: Tandem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_RUNS", str(tmp_path / "volume"))
    (tmp_path / "volume").mkdir()
    assert tandem("runs")[:2] == (0, "No runs in volume yet.\n")
    make(tmp_path / "volume/mine", [0.1])
    make(tmp_path / "volume/other", [0.2])
    assert {*listed(tandem)} == {"mine", "other"}
    assert tandem("runs", "compare", "mine", "other")[0] == 0


def test_a_project_without_runs_is_not_an_error_and_a_wrong_folder_is(tandem: Tandem, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/config.yaml").touch()
    assert tandem("runs", "p")[:2] == (0, "No runs in p yet.\n")
    assert listed(tandem, "p") == {}
    (tmp_path / "home/photos").mkdir(parents=True)
    for folder in ("home", "missing", "p/config.yaml"):
        code, _, errors = tandem("runs", folder)
        assert (code, "expected the folder of a project" in errors, "Fix:" in errors) == (2, True, True), folder


def test_a_name_cannot_control_the_terminal(tandem: Tandem, tmp_path: Path) -> None:
    make(tmp_path / "runs/a\x1b[31m\nb", [0.1])
    make(tmp_path / "runs/[red]c", [0.1])
    for words in (("runs",), ("runs", "compare", "runs/a\x1b[31m\nb", "runs/[red]c")):
        _, out, _ = tandem(*words)
        assert "\x1b" not in out
        assert "a·[31m⏎b" in out
        assert "[red]c" in out


def test_a_comparison_has_the_figures_of_complete_runs(tandem: Tandem, tmp_path: Path) -> None:
    make(tmp_path / "runs/a", [0.0, *[0.9] * 10, *[0.5] * 10], evals={10: 0.8, 20: 0.6})
    folder = make(tmp_path / "runs/b", [0.1] * 3)
    (folder / "eval.jsonl").unlink()
    lines = [step(n, 0.2, lag_max=n % 3, kl_sampler=n / 100) for n in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    code, out, _ = tandem("runs", "compare", "a", "b", "--json")
    a, b = json.loads(out)["runs"]
    assert code == 0
    assert {name: a["figures"][name] for name in ("reward, last", "reward, best", "evaluation, best", "tokens")} == {
        "reward, last": pytest.approx(0.5), "reward, best": pytest.approx(0.9), "evaluation, best": 0.8, "tokens": 2100,
    }  # fmt: skip
    assert a["figures"]["evaluation, last"] == 0.6
    assert (b["figures"]["evaluation, last"], b["figures"]["lag, largest"]) == (None, 2.0)
    assert b["figures"]["kl_sampler"] == pytest.approx(sum(range(11, 21)) / 1000)
    assert b["figures"]["hours"] == pytest.approx(40 / 3600)
    assert b["figures"]["tokens/s"] == pytest.approx(50)
    _, table, _ = tandem("runs", "compare", "a", "b")
    assert re.search(r"evaluation, best +0\.8 +–", table)
    assert "entropy" not in table  # neither run has it


def test_the_settings_that_differ_are_shown_without_those_that_name_places(tandem: Tandem, tmp_path: Path) -> None:
    for name, rate in (("a", "1e-5"), ("b", "2e-5")):
        settings(
            make(tmp_path / "runs" / name, [0.1]), trainer__optim__learning_rate=rate, trainer__run_name=name,
            shared__weights_dir=f"/tmp/{name}",
        )  # fmt: skip
    make(tmp_path / "runs/script", [0.1])
    _, out, _ = tandem("runs", "compare", "a", "b", "script", "--json")
    assert json.loads(out)["settings"] == {"trainer.optim.learning_rate": ["1e-05", "2e-05", None]}
    _, table, _ = tandem("runs", "compare", "a", "b", "script")
    assert re.search(r"trainer\.optim\.learning_rate +1e-05 +2e-05 +–", table)
    assert "The settings of script are not known" in table


def test_the_chart_has_each_run_where_its_rewards_are(tmp_path: Path) -> None:
    low, high = make(tmp_path / "low", [0.0] * 50), make(tmp_path / "high", [1.0] * 100)
    lines = chart(read_runs([low, high]), 50, 10).plain.splitlines()
    assert lines[1].count("B") > 35
    assert lines[10].count("A") in range(18, 24)
    assert {*"".join(lines[2:10])} <= {*" ┤0.56"}
    assert re.search(r"step 0 +100$", lines[12])
    for rewards in ([0.5], [None], []):
        chart(read_runs([make(tmp_path / f"{rewards}", [*rewards])]), 50, 10)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".html"])
def test_a_comparison_is_saved_as_a_picture(tandem: Tandem, tmp_path: Path, suffix: str) -> None:
    make(tmp_path / "runs/a$b$<script>", [0.1, 0.5], evals={1: 0.3})
    make(tmp_path / "runs/b", [])
    path = tmp_path / f"picture{suffix}"
    assert tandem("runs", "compare", "a$b$<script>", "b", "--save", path)[0] == 0
    data = path.read_bytes()
    start = {".svg": b"<?xml", ".png": b"\x89PNG", ".html": b"<!doctype html>"}[suffix]
    assert data.startswith(start)
    if suffix == ".html":
        assert b"a$b$<script>" not in data
        assert not re.search(rb"<(script|link|img)[^>]* (src|href)=", data)  # it needs no network


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compare", "runs/mine"), "got one run, expected two or more"),
        (("compare", "runs/mine", "runs/missing"), "got runs/missing, expected the folder of a run"),
        (("compare", "runs/mine", "mine", "--save", "x.pdf"), "expected a file that ends in .svg, .png, .html"),
        (("--sort", "x"), "does not accept"),
    ],
    ids=["one", "missing", "suffix", "option"],
)
def test_a_mistake_is_reported_with_what_is_expected(
    tandem: Tandem, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    make(tmp_path / "runs/mine", [0.1])
    code, _, errors = tandem("runs", *words)
    assert (code, message in errors) == (2, True), errors


def test_a_picture_that_cannot_be_written_is_an_error_without_a_traceback(tandem: Tandem, tmp_path: Path) -> None:
    make(tmp_path / "runs/a", [0.1])
    make(tmp_path / "runs/b", [0.1])
    code, _, errors = tandem("runs", "compare", "a", "b", "--save", "missing/x.svg")
    assert (code, errors.startswith("error: ")) == (1, True)


def test_only_the_ends_of_a_large_file_are_parsed(
    tandem: Tandem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "runs/mine", [0.1] * 5000)
    parsed: list[bytes] = []
    from tandem_cli.watch import json_lines

    original = json_lines.parse
    monkeypatch.setattr(json_lines, "parse", lambda data: parsed.append(data) or original(data))
    assert listed(tandem)["mine"]["duration_s"] == 10_000.0
    assert len(parsed) == 10


def test_listing_changes_nothing_in_the_folder_of_a_run(tandem: Tandem, tmp_path: Path) -> None:
    folder = make(tmp_path / "runs/mine", [0.1])
    (folder / "LOCK").touch()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}
    tandem("runs")
    tandem("runs", "compare", "mine", "mine")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")} == before
