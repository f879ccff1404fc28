"""The examples: their configurations are valid, their held-out data is separate, their rewards are right."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tandem_protocol.config.generator
import tandem_protocol.config.trainer
from tandem_protocol.config import load

EXAMPLES = Path(__file__).parents[2] / "examples"
ARITHMETIC = EXAMPLES / "arithmetic"
DIGITS = EXAMPLES / "digits"
JUDGE = EXAMPLES / "judge"
PROJECTS = sorted(path.parent for path in EXAMPLES.glob("*/config.yaml"))


def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_example_is_tested() -> None:
    assert [project.name for project in PROJECTS] == ["agent", "arithmetic", "calculator", "digits", "game", "judge"]


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.name)
def test_both_services_accept_the_configuration(project: Path) -> None:
    generator, _ = load(tandem_protocol.config.generator.GeneratorSettings, path=project / "config.yaml", env={})
    trainer, _ = load(tandem_protocol.config.trainer.TrainerSettings, path=project / "config.yaml", env={})
    rollout = trainer.trainer.rollout
    assert generator.generator.vllm["max_num_seqs"] >= rollout.num_prompts * rollout.num_generations
    assert generator.shared == trainer.shared
    assert trainer.trainer.eval is not None
    assert trainer.trainer.eval.prompts.source != trainer.trainer.prompts.source


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.name)
def test_the_readme_lists_exactly_the_files_of_the_example(project: Path) -> None:
    listed = set(re.findall(r"^\| `([\w.]+)`", (project / "README.md").read_text(), re.MULTILINE))
    created = {"model", "prompts.jsonl", "held_out.jsonl"}
    existing = {path.name for path in project.iterdir() if path.is_file() and path.suffix != ".jsonl"}
    assert listed - created == existing - {"README.md"}


def test_digits_rewards_only_the_ascending_order() -> None:
    reward = module(DIGITS / "rewards.py").exact_match
    answers = ["123", "321", "12", "1233", "", "123"]
    assert reward(completions=answers, answer=["123"] * 6, prompts=["312>"] * 6) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_digits_prompts_are_reproducible_and_held_out_prompts_are_separate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create_empty(Path("model/model.safetensors"))
    module(DIGITS / "prepare.py").main()
    train = rows(Path("prompts.jsonl"))
    held_out = rows(Path("held_out.jsonl"))
    module(DIGITS / "prepare.py").main()
    assert (rows(Path("prompts.jsonl")), rows(Path("held_out.jsonl"))) == (train, held_out)
    assert len(held_out) == 256
    assert len({row["prompt"] for row in train + held_out}) == len(train) + len(held_out)
    assert all(row["answer"] == "".join(sorted(row["prompt"].removesuffix(">"))) for row in train + held_out)


@pytest.mark.slow
def test_the_initial_digits_model_is_right_in_10_to_40_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module(DIGITS / "prepare.py").main()
    created = Path("model/model.safetensors").stat()
    module(DIGITS / "prepare.py").main()
    assert Path("model/model.safetensors").stat() == created, "a second run keeps the model"

    torch.manual_seed(0)
    questions = rows(Path("held_out.jsonl"))
    assert 0.1 <= exact_match(questions, do_sample=False) <= 0.4
    assert 0.05 <= exact_match(questions * 4, do_sample=True, top_k=0) <= 0.4


def exact_match(questions: Sequence[dict[str, Any]], **sampling: Any) -> float:
    """Return the share of right answers of the model in `model/`."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model")
    prompts = tokenizer([row["prompt"] for row in questions], return_tensors="pt").input_ids
    generated = model.generate(prompts, max_new_tokens=8, **sampling)[:, prompts.shape[1] :]
    completions = tokenizer.batch_decode(generated, skip_special_tokens=True)
    right = [completion == row["answer"] for completion, row in zip(completions, questions, strict=True)]
    return sum(right) / len(right)


def test_judge_prefers_the_easier_name_in_either_position() -> None:
    prefer = module(JUDGE / "judge.py").prefer
    pairs = [["milone", "mrtlpq"], ["mrtlpq", "milone"], ["milone", "mileno"], ["milone", "mimimi"], ["milone", "mil"]]
    assert prefer(prompts=["ka"] * 5, completions=pairs) == [0, 1, None, 0, 0]


def test_judge_training_and_held_out_prompts_are_disjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_empty(Path("model/model.safetensors"))
    module(JUDGE / "prepare.py").main()
    train, held_out = ({row["prompt"] for row in rows(Path(name))} for name in ("prompts.jsonl", "held_out.jsonl"))
    assert (len(train), len(held_out)) == (548, 128)
    assert not train & held_out


def test_arithmetic_rewards_are_the_scores_of_the_questions_verifier() -> None:
    pytest.importorskip("reasoning_gym", reason="examples/arithmetic/requirements.txt is not installed")
    reward = module(ARITHMETIC / "rewards.py").score_answer
    entry = {"answer": "14", "metadata": {"source_dataset": "basic_arithmetic"}}
    answers = ["5 + 9 = 14", "14", "5 + 9 = 15", "It is 14", "5 + 9 =", ""]
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert reward(completions=completions, entry=[entry] * 6, prompts=[[]] * 6) == [1.0, 1.0, 0.0, 0.25, 0.0, 0.0]


def test_arithmetic_training_and_held_out_expressions_are_disjoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym", reason="examples/arithmetic/requirements.txt is not installed")
    monkeypatch.chdir(tmp_path)
    create_empty(Path("model/model.safetensors"))
    module(ARITHMETIC / "prepare.py").main()
    train, held_out = (
        {row["entry"]["metadata"]["expression"] for row in rows(Path(name))}
        for name in ("prompts.jsonl", "held_out.jsonl")
    )
    assert len(train) > 1000
    assert len(held_out) > 100
    assert not train & held_out


@pytest.mark.slow
def test_the_converted_arithmetic_model_has_its_chat_template_and_answers_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="examples/arithmetic/requirements.txt is not installed")
    monkeypatch.chdir(tmp_path)
    prepare = module(ARITHMETIC / "prepare.py")
    monkeypatch.setattr(prepare, "hub_answers", lambda: False)
    prepare.get_model()
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(generated) == "The capital of France is Paris.<|im_end|>"


def create_empty(file: Path) -> None:
    file.parent.mkdir()
    file.touch()
