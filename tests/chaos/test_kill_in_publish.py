"""Trainer and generator are killed in every phase of a publish: no wrong weights are loaded, and nothing is lost.

vLLM is asked for completions all the time, and `transformers` says whether each token is of the version that it names.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

import httpx
import pytest

from support import forked_vllm, publish_faults
from support.forked import start_trainer
from support.generators import Generator, NoRollouts, spawn
from support.models import make_tiny_model
from support.ports import free_port, is_free
from support.projects import Project
from support.publish_faults import TrainerFault
from support.published_policies import TOLERANCE, Answer, PublishedPolicies
from support.served import wait_until
from tandem_protocol.chains import closure
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

STEPS = {"full": 24, "delta": 24, "vllm": 30}
"""Number of steps with the mock and complete versions, with the mock and deltas, and with vLLM and both."""
LEARNING_RATE = {"full": 1e-3, "delta": 5e-6, "vllm": 2e-4}
"""With vLLM, other weights have other tokens, but most deltas are small enough that no complete files are added."""
SEED = int(os.environ.get("TANDEM_CHAOS_SEED", "0"))
TIMEOUT_S = 500.0
KEEP = 2
TESTS = str(Path(__file__).parents[1])
PROGRAM = ("-c", f"import sys; sys.path.insert(0, {TESTS!r}); import support.publish_faults as f; f.run_generator()")


class Lives:
    """The trainer and the generator, which are started again when they have died, each time with the next fault."""

    def __init__(self, folder: Path, kind: str) -> None:
        print(f"TANDEM_CHAOS_SEED={SEED}")
        self.chance = random.Random(SEED)
        self.folder, self.port = folder, free_port()
        self.published, self.loaded = folder / "published.jsonl", folder / "loaded.jsonl"
        self.model = make_tiny_model(folder / "model", vocab=75, initializer_range=0.3 if kind == "vllm" else 0.02)
        (folder / "weights").mkdir()
        self.kind, self.steps = kind, STEPS[kind]
        self.policies = PublishedPolicies(self.model, folder / "policies") if kind == "vllm" else None
        self.answers: list[Answer] = []
        self.trainer_faults = self._trainer_faults()
        self.generator_places = self._generator_places()
        self.faults = Counter(trainer=len(self.trainer_faults), generator=len(self.generator_places))
        self.deaths = Counter[str]()
        self.generator = self._start_generator()
        self.project = Project(
            folder / "project", self.model, self.generator, folder / "weights", max_steps=self.steps,
            max_lag=1, publish={"keep": KEEP},
            learner={"dtype": "float32" if kind == "full" else "bfloat16"},
            optim={"learning_rate": LEARNING_RATE[kind]}, checkpoint={"every_steps": 1},
        )  # fmt: skip
        self.trainer = self._start_trainer()

    def _trainer_faults(self) -> list[TrainerFault]:
        """Every place in random order: with complete versions, with deltas, or both."""
        places: list[tuple[Literal["never", "always"], str]] = []
        if self.kind != "delta":
            places += [("never", place) for place in publish_faults.TRAINER]
        if self.kind != "full":
            places += [("always", place) for place in publish_faults.DELTA_TRAINER]
        faults, most = [], 3 if self.kind == "full" else 2
        for delta, place in places:
            lags = (1,) if place in publish_faults.NOT_BEHIND else (0, 1)
            for max_lag in (self.chance.choice(lags),) if self.kind == "vllm" else lags:
                faults.append(TrainerFault(place, self.chance.randint(1, most), delta, max_lag))
        self.chance.shuffle(faults)
        return faults

    def _generator_places(self) -> list[tuple[str, int]]:
        """Every place in random order, with the second version, and with the mock also with the one at the start."""
        kinds = {
            "full": publish_faults.GENERATOR,
            "delta": publish_faults.DELTA_GENERATOR,
            "vllm": publish_faults.VLLM_GENERATOR,
        }
        numbers = (2,) if self.kind == "vllm" else (1, 2)
        places = [(place, number) for place in kinds[self.kind] for number in numbers]
        self.chance.shuffle(places)
        # The last one comes first. Later there may be no complete versions.
        return sorted(places, key=lambda one: self.kind == "vllm" and one[0] == "verified")

    def _start_generator(self) -> Generator:
        place, number = self.generator_places.pop() if self.generator_places else ("none", 0)
        print(f"generator: {place} {number}")
        faults = (str(self.loaded), place, str(number))
        engine, program, start = ("vllm", (), forked_vllm.spawn) if self.policies else ("mock", PROGRAM, spawn)
        return Generator(
            engine, self.model, self.folder / "weights", "--generator.materialize_dir", str(self.folder / "local"),
            log=self.folder / "generator.log", port=self.port, program=(*program, *faults), spawn=start,
        )  # fmt: skip

    def _start_trainer(self) -> ForkServerProcess:
        delta: Literal["never", "always"] = "never" if self.kind == "full" else "always"
        fault = self.trainer_faults.pop() if self.trainer_faults else TrainerFault(delta=delta)
        print(f"trainer: {fault}")
        policies = self.policies.folder if self.policies else None
        prepare = partial(publish_faults.arm_trainer, self.published, fault, policies)
        config = self.project.directory / "config.yaml"
        return start_trainer(config, self.project.directory / "trainer.log", prepare)

    def _ask(self) -> None:
        """Compare completions with the published versions, if the generator answers."""
        if self.policies:
            with suppress(httpx.TransportError, NoRollouts):
                self.answers.append(self.policies.ask(self.generator))

    def run(self) -> None:
        """Run until the trainer has finished, and every fault has happened."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.trainer.exitcode is None or self.trainer.exitcode < 0:
            assert time.monotonic() < deadline, self.log
            if self.trainer.exitcode is not None:
                assert self.trainer.exitcode == -signal.SIGKILL, self.log
                self.deaths["trainer"] += 1
                self._check_latest()
                self.trainer = self._start_trainer()
            if (status := self.generator.process.poll()) is not None:
                assert status == -signal.SIGKILL, (self.folder / "generator.log").read_text()[-3000:]
                self.deaths["generator"] += 1
                wait_until(lambda: is_free(self.port))  # vLLM's processes die one after another
                self.generator = self._start_generator()
            self._ask()
            time.sleep(0.01)
        self._ask()
        assert self.trainer.exitcode == 0, self.log
        assert self.deaths == self.faults, "every fault has happened"

    def _check_latest(self) -> None:
        """What a generator would load now is whole, and was published."""
        store = WeightStore(self.folder / "weights")
        if latest := store.latest():
            store.verify(store.read(latest)[0])

    @property
    def log(self) -> str:
        return (self.project.directory / "trainer.log").read_text()[-3000:]

    def close(self) -> None:
        self.trainer.kill()
        self.generator.kill()
        self.generator.client.close()


ALL = ["full", "delta", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])]


@pytest.fixture(scope="module", params=ALL)
def lives(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Lives]:
    lives = Lives(tmp_path_factory.mktemp("lives"), request.param)
    try:
        lives.run()
        yield lives
    finally:
        lives.close()


def test_no_generator_loads_other_weights_than_the_trainer_published(lives: Lives) -> None:
    published = publish_faults.noted(lives.published)
    loaded = publish_faults.noted(lives.loaded)
    assert len(dict(published)) == len(set(published)), "a version has one meaning"
    assert len({version for version, _ in loaded}) > lives.steps // 2
    assert set(loaded) <= set(published)
    sampled = {version for line in lives.project.lines("rollouts.jsonl") for version in line["versions"]}
    assert sampled <= {version for version, _ in loaded}
    assert str(lives.generator.served.version) == loaded[-1][0] == published[-1][0]


@pytest.mark.parametrize("lives", ALL[2:], indirect=True)
def test_every_token_of_vllm_is_of_the_version_that_its_completion_names(lives: Lives) -> None:
    assert lives.policies
    assert all(answer.is_greedy and answer.mismatch <= TOLERANCE for answer in lives.answers), lives.answers
    asked = {version for answer in lives.answers for version in answer.versions}
    assert len(asked) > lives.steps // 2, "many versions were asked"
    first, last = min(asked), max(asked)
    assert lives.policies.distance(first, last) > 50 * TOLERANCE, "other weights would be noticed"


def test_every_step_is_learned_once(lives: Lives) -> None:
    assert lives.project.steps == [*range(1, lives.steps + 1)]
    lags = [line["lag_max"] for line in lives.project.lines("metrics.jsonl")]
    assert max(lags) <= lives.project.max_lag


def test_the_store_holds_whole_versions_and_nothing_else(lives: Lives) -> None:
    store = WeightStore(lives.folder / "weights")
    versions = store.versions()
    assert store.latest() == versions[-1] == Version(lives.steps, versions[-1].attempt)
    for version in versions:
        store.verify(store.read(version)[0])
    assert set(versions) == closure(store, versions[-KEEP:])
    assert any(store.read(version)[0].delta for version in versions) == (lives.kind != "full")
    assert sorted(path.name for path in store.root.iterdir()) == ["LATEST", "WRITER", "served", "versions"]
    assert sorted(path.name for path in (store.root / "versions").iterdir()) == [
        store.directory(version).name for version in versions
    ]
    (lease,) = (store.root / "served").iterdir()
    assert lease.suffix == ".json"
