"""The rollout side works where torch is not installed: it reads a project, samples from a generator and scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.generators import TOKEN, running
from support.projects import write_project

IMPORT_ALL = """
import importlib, pkgutil, sys
import tandem_rollout

for module in pkgutil.walk_packages(tandem_rollout.__path__, "tandem_rollout."):
    importlib.import_module(module.name)
print(*{"torch", "vllm"} & sys.modules.keys())
"""
SAMPLE = """
import json, sys
from pathlib import Path

sys.modules["torch"] = None  # importing it raises ModuleNotFoundError

import anyio
from tandem_protocol.config import load, read_token
from tandem_protocol.config.trainer import TrainerSettings
from tandem_protocol.messages import Prompt, RolloutRequest
from tandem_rollout.client import GeneratorClient
from tandem_rollout.project import load_inputs
from tandem_rollout.completions import CompletionReader
from tandem_rollout.sampler import Sampler, sampling

sys.path.insert(0, ".")
config = load(TrainerSettings, path=Path("config.yaml"))[0]
inputs = load_inputs(config, processes=1)
rows = inputs.rows[:2]


async def main():
    client = GeneratorClient([sys.argv[1]], read_token())
    request = RolloutRequest(
        prompts=tuple(Prompt(token_ids=row.token_ids) for row in rows), sampling=sampling(config.trainer.rollout)
    )
    groups = {}
    try:
        sampler = Sampler(client, CompletionReader(inputs.tokenizer), inputs.scorer)
        await sampler.collect(request, rows, groups.__setitem__, timeout_s=60)
    finally:
        await client.close()
    return [[group.trajectories[0].prompt[0]["content"], list(group.rewards)] for _, group in sorted(groups.items())]


print(json.dumps(anyio.run(main)))
"""


def run(program: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "TANDEM_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_rollout_side_does_not_import_torch_where_it_is_installed(tmp_path: Path) -> None:
    assert run(IMPORT_ALL, folder=tmp_path).split() == []


def test_a_project_is_read_sampled_and_scored_where_torch_is_not_installed(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    write_project(folder)
    with running("mock", folder / "model", tmp_path / "weights", log=tmp_path / "generator.log") as generator:
        groups = json.loads(run(SAMPLE, f"http://127.0.0.1:{generator.port}", folder=folder))
    assert [prompt for prompt, _ in groups] == ["0+0=", "0+1="]
    assert all(0 <= reward <= 1 for _, rewards in groups for reward in rewards)
    assert [len(rewards) for _, rewards in groups] == [4, 4]
