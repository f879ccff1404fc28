"""Besides weights, checkpoints and exports hold copies of the user's files, which are tested before the first step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.models import make_tiny_model
from support.rollouts import completion, scored
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.fingerprint import fingerprint
from tandem_rollout.errors import UserError
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner.learner import Learner

IDS = torch.tensor([[4, 5, 6, 7]])
TEXT = "12+34=46, is it?"


def make_config(tmp_path: Path, **trainer: Any) -> TrainerConfig:
    rewards = [{"function": "rewards:r"}]
    return TrainerConfig.model_validate(
        {"max_steps": 2, "rewards": rewards, "output_dir": str(tmp_path / "runs"), "optim": {"learning_rate": 0.01}}
        | trainer
    )


def make_learner(model: Path, tmp_path: Path, **trainer: Any) -> Learner:
    shared = SharedConfig(model=str(model), trust_remote_code=True, weights_dir=tmp_path / "weights")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    return Learner(shared, make_config(tmp_path, **trainer), tokenizer, Accelerator(cpu=True), needs_reference=False)


def update(learner: Learner, tmp_path: Path) -> None:
    algorithm = Grpo(make_config(tmp_path))
    batch = algorithm.make_batch([scored([4, 5], [completion([6, 7]), completion([9])], [1.0, 0.0])])
    learner.update(batch, algorithm)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def tokens(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    turns = [{"role": "user", "content": TEXT}]
    return tokenizer(TEXT).input_ids, tokenizer.apply_chat_template(turns, tokenize=False)


# -- models as users have them ---------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def generation_config_that_transformers_does_not_write(model: Path) -> None:
    text = '{"do_sample": false, "temperature": 0.9, "top_p": 0.6, "_from_model_config": true,\n "mine": 1}'
    (model / "generation_config.json").write_text(text)


def no_generation_config(model: Path) -> None:
    (model / "generation_config.json").unlink()


def keys_that_transformers_does_not_know(model: Path) -> None:
    edit(model / "config.json", attention_dropout=0.25, mine={"a": [1]}, torch_dtype="bfloat16", _name_or_path="there")


def chat_template_in_a_file_of_its_own(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "short.jinja").write_text("-")


def named_chat_templates(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    templates = [{"name": "default", "template": "d {{ messages[0].content }}"}, {"name": "rag", "template": "r"}]
    edit(model / "tokenizer_config.json", chat_template=templates)


STRAYS = (
    "optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "README.md",
    "data.jsonl",
    "adapter_config.json.bak",
)


def strays(model: Path) -> None:
    for name in STRAYS:
        (model / name).write_text("{}")
    shutil.copyfile(model / "model.safetensors", model / "consolidated.safetensors")


def weights_in_a_pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

class MineTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        return super().__call__(text[::-1], **options)
"""


def code_of_its_own(model: Path) -> None:
    (model / "code_of_mine.py").write_text(CODE)
    mine = {
        name: f"code_of_mine.Mine{kind}"
        for name, kind in (("AutoConfig", "Config"), ("AutoModelForCausalLM", "ForCausalLM"))
    }
    edit(model / "config.json", model_type="mine", architectures=["MineForCausalLM"], auto_map=mine)
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "code_of_mine.MineTokenizer"]},
        tokenizer_class="MineTokenizer",
    )
    assert AutoTokenizer.from_pretrained(model, trust_remote_code=True)("12").input_ids == [5, 4]


MODELS: list[Callable[[Path], None]] = [
    generation_config_that_transformers_does_not_write,
    no_generation_config,
    keys_that_transformers_does_not_know,
    chat_template_in_a_file_of_its_own,
    named_chat_templates,
    strays,
    weights_in_a_pickle,
    code_of_its_own,
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


@pytest.mark.parametrize("change", MODELS)
def test_checkpoint_holds_the_policy_and_copies_of_the_users_files(
    change: Callable[[Path], None], model: Path, tmp_path: Path
):
    change(model)
    learner = make_learner(model, tmp_path)
    learner.rehearse()
    update(learner, tmp_path)
    learner.save(tmp_path / "saved")
    saved = tmp_path / "saved" / "model"

    theirs = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(logits(theirs), logits(learner.model))
    assert tokens(saved) == tokens(model)
    assert fingerprint(saved) == fingerprint(model)
    kept = {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "code_of_mine.py",
        "chat_template.jinja",
    }
    for path in [model / name for name in kept] + list(model.glob("additional_chat_templates/*")):
        copy = saved / path.relative_to(model)
        assert copy.is_file() == path.is_file()
        assert not path.is_file() or copy.read_bytes() == path.read_bytes()
    assert {path.name for path in saved.glob("*")} <= {path.name for path in model.glob("*")} | {"model.safetensors"}
    assert not {path.name for path in saved.glob("*")} & {*STRAYS, "consolidated.safetensors"}

    resumed = make_learner(model, tmp_path)
    resumed.load(tmp_path / "saved")
    assert torch.equal(logits(resumed.model), logits(learner.model))


def test_saved_config_keeps_the_original_dropout_settings(model: Path, tmp_path: Path):
    keys_that_transformers_does_not_know(model)
    learner = make_learner(model, tmp_path)
    learner.save(tmp_path / "saved")
    assert learner.model.config.attention_dropout == 0.0
    config = json.loads((tmp_path / "saved" / "model" / "config.json").read_text())
    assert (config["attention_dropout"], config["mine"], config["torch_dtype"]) == (0.25, {"a": [1]}, "float32")


def test_saved_files_are_those_of_the_start_if_the_models_folder_changes(model: Path, tmp_path: Path):
    learner = make_learner(model, tmp_path)
    learner.rehearse()
    before = tokens(model)
    shutil.rmtree(model)
    learner.save(tmp_path / "saved")
    assert tokens(tmp_path / "saved" / "model") == before


def test_adapter_folder_has_the_tokenizer_but_no_config_json(model: Path, tmp_path: Path):
    learner = make_learner(model, tmp_path, lora={"r": 2})
    learner.rehearse()
    learner.save(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not names & {"config.json", "generation_config.json"}
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "model")), logits(learner.model)
    )


def test_tokenizer_that_depends_on_its_folders_name_is_saved_correctly(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    named = Path("deepseek-ai", "deepseek-coder-mine")
    (tmp_path / named).parent.mkdir()
    model.rename(tmp_path / named)
    edit(tmp_path / named / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    monkeypatch.chdir(tmp_path)
    learner = make_learner(named, tmp_path)
    learner.rehearse()
    learner.save(tmp_path / "saved")
    assert tokens(tmp_path / "saved" / "model") == tokens(named)


# -- models that cannot be saved are refused before the first step ---------------------------------------------------


def test_a_tokenizer_whose_files_cannot_be_copied_is_refused(model: Path, tmp_path: Path):
    code_of_its_own(model)
    (model / "parts").mkdir()
    (model / "parts" / "secret.txt").write_text("x")
    with (model / "code_of_mine.py").open("a") as code:
        code.write("""
    def __init__(self, *args, **options):
        from pathlib import Path
        Path(options["name_or_path"], "parts", "secret.txt").read_text()
        super().__init__(*args, **options)
""")
    learner = make_learner(model, tmp_path)
    with pytest.raises(UserError, match=r"tokenizer of shared\.model.*cannot be exported.*parts/secret\.txt"):
        learner.rehearse()


def test_dtype_that_safetensors_cannot_hold_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    learner = make_learner(model, tmp_path)
    learner.model.model.register_buffer("turns", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UserError, match=r"model\.turns of LlamaForCausalLM has the dtype torch\.complex64"):
        learner.rehearse()


@pytest.mark.parametrize(("place", "what"), [("runs", "a checkpoint needs"), ("weights", "a published version needs")])
def test_too_small_disk_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, what: str):
    learner = make_learner(model, tmp_path)
    usage = shutil.disk_usage

    def disk_usage(folder: Path) -> Any:
        return usage(folder)._replace(free=1000) if place in folder.parts else usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(UserError, match=f"{place}.* has 0.0 MB free, but {what}"):
        learner.rehearse()


def test_a_rehearsal_leaves_nothing_behind(model: Path, tmp_path: Path):
    learner = make_learner(model, tmp_path)
    learner.rehearse()
    assert list((tmp_path / "runs" / "default").iterdir()) == []


# -- tensors that safetensors would refuse ---------------------------------------------------------------------------


def test_tensors_that_share_memory_or_are_not_contiguous_are_saved_completely(model: Path, tmp_path: Path):
    learner = make_learner(model, tmp_path)
    first = learner.model.model.layers[0].mlp
    second = learner.model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    first.down_proj.weight.data = first.down_proj.weight.data.T.contiguous().T
    learner.model.register_buffer("not_saved", torch.ones(2), persistent=False)
    learner.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model" / "model.safetensors")
    assert torch.equal(saved["model.layers.1.mlp.up_proj.weight"], first.up_proj.weight)
    assert torch.equal(saved["model.layers.0.mlp.down_proj.weight"], first.down_proj.weight)
    assert not {"not_saved", "lm_head.weight"} & saved.keys()


# -- weights that do not fit the configuration -----------------------------------------------------------------------


def test_missing_weights_are_refused_by_name(model: Path, tmp_path: Path):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 2 weights.*model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"
    ):
        make_learner(model, tmp_path)


def test_checkpoint_with_an_untied_head_but_a_tied_config_is_refused(model: Path, tmp_path: Path):
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"holds a different lm_head\.weight.*set tie_word_embeddings to false"):
        make_learner(model, tmp_path)
