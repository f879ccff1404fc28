"""The files of a model besides its weights: what makes a checkpoint or an export a folder that everyone can load.

They are the user's own files. `transformers` would write others: it leaves out what it does not know, and refuses what
it finds wrong, such as Vicuna's `generation_config.json`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from tandem_protocol.config import SharedConfig

from .errors import UserError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_COPIED = re.compile(r".+\.(json|jinja|txt|model|tiktoken|vocab|bpe|spm|py)|(LICENSE|NOTICE).*")
"""What tokenizers, configurations and their code consist of."""
_NOT_COPIED = re.compile(r"\..*|config\.json|.*\.index\.json|adapter_.*|trainer_state\.json|.*_results\.json")
"""What training with another tool has left there, and what is written here."""
_MOST_BYTES = 1 << 28
"""Of a file that is copied: a larger one is data."""
_TEMPLATES = "additional_chat_templates"
_PROBE = "The café's bill:\n\t12 + 345 = 357 €  漢字 🙂 <|x|> def f(a, b):"
"""Text whose tokens show whether two tokenizers are the same."""


def model_dir(source: str | Path, revision: str | None = None) -> Path:
    """Where the files of a model are on this machine: the directory itself, or one in the hub's cache."""
    return Path(cached_file(source, CONFIG, revision=revision)).parent


class ModelFiles:
    """What the folder of one model holds besides weights, collected before the first step."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shared: SharedConfig, dtype: str = "float32"
    ) -> None:
        """Collect the files of `shared.model`, of which `model` and `tokenizer` were made, and load them once.

        Args:
            dtype: of the weights that will lie beside them.

        Raises:
            UserError: what was collected cannot be loaded, or is another tokenizer than `tokenizer`.
        """
        self._folder = TemporaryDirectory(prefix="tandem-model-files-")  # goes with this object
        self._path = Path(self._folder.name)
        source = model_dir(shared.model, shared.revision)
        for path in filter(_is_copied, source.iterdir()):
            shutil.copyfile(path, self._path / path.name)
        if (source / _TEMPLATES).is_dir():
            shutil.copytree(source / _TEMPLATES, self._path / _TEMPLATES)
        config = _config(source, model, shared)
        config.setdefault("architectures", [type(model).__name__.removeprefix("FSDP")])
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        (self._path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        self._try_config(shared)
        self._keep_tokenizer(tokenizer, shared)

    def copy_to(self, directory: Path, *, adapter: bool = False) -> None:
        """Write them into `directory`; beside an adapter without config.json, with which it would count as a model.

        Raises:
            OSError: such as ENOSPC when the disk is full.
        """
        left_out = {CONFIG, GENERATION_CONFIG} if adapter else set()
        for path in self._path.rglob("*"):
            if path.is_file() and path.name not in left_out:
                copy = directory / path.relative_to(self._path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)  # not its permissions, which are those of a private folder

    def _try_config(self, shared: SharedConfig) -> None:
        try:
            AutoConfig.from_pretrained(self._path, trust_remote_code=shared.trust_remote_code)
        except Exception as error:  # of any kind: the model's own code may run here
            raise UserError(
                f"shared.model {shared.model!r} cannot be exported: its {CONFIG}, copied to another folder, cannot be "
                f"loaded: {_reason(error)}. Fix: put every file that it names (auto_map) into the "
                "model's own directory."
            ) from error

    def _keep_tokenizer(self, tokenizer: PreTrainedTokenizerBase, shared: SharedConfig) -> None:
        """As its files are; or as `transformers` writes it, if it is made from files that mean something else here.

        Some tokenizers are chosen by the name of the folder: those of `deepseek-r1-distill-llama-*`.
        """
        problem = self._tokenizer_problem(tokenizer, shared)
        if problem is None:
            return
        try:
            tokenizer.save_pretrained(self._path)
        except Exception as error:  # of any kind: the tokenizer's own code may run here
            problem = f"{problem}; it cannot be saved either: {_reason(error)}"
        else:
            problem = self._tokenizer_problem(tokenizer, shared)
        if problem:
            raise UserError(
                f"the tokenizer of shared.model {shared.model!r} cannot be exported: copied to another folder, "
                f"{problem}. Expected the same tokenizer. Fix: save it once with `save_pretrained` into the model's "
                "directory, together with its code if it has its own."
            )

    def _tokenizer_problem(self, tokenizer: PreTrainedTokenizerBase, shared: SharedConfig) -> str | None:
        try:
            copy = AutoTokenizer.from_pretrained(self._path, trust_remote_code=shared.trust_remote_code)
            ours, theirs = _tokenizer_facts(tokenizer), _tokenizer_facts(copy)
        except Exception as error:  # of any kind: the tokenizer's own code may run here
            return f"it cannot be loaded: {_reason(error)}"
        return next((f"its {name} is another" for name in ours if ours[name] != theirs[name]), None)


def _is_copied(path: Path) -> bool:
    name = path.name
    chosen = _COPIED.fullmatch(name) and not _NOT_COPIED.fullmatch(name)
    return bool(chosen) and path.is_file() and path.stat().st_size <= _MOST_BYTES


def _reason(error: BaseException) -> str:
    """Of an error and of the one that it began with, which `transformers` leaves out of its own messages."""
    first = error
    while cause := first.__cause__ or first.__context__:
        first = cause
    told = f"{type(error).__name__}: {error}"
    return told if first is error else f"{told} ({type(first).__name__}: {first})"


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocabulary": tokenizer.get_vocab(),
        "chat template": tokenizer.chat_template,
        "way to cut text into tokens": tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
        "end-of-sequence token": tokenizer.eos_token_id,
    }


def _config(source: Path, model: PreTrainedModel, shared: SharedConfig) -> dict[str, Any]:
    """The user's config.json; of the part of a larger model that is trained, if it is one, that part's."""
    config: dict[str, Any] = json.loads((source / CONFIG).read_text())
    if config.get("model_type", model.config.model_type) == model.config.model_type:
        return config
    whole = AutoConfig.from_pretrained(source, trust_remote_code=shared.trust_remote_code)
    part: dict[str, Any] = json.loads(whole.get_text_config().to_json_string())
    return {name: value for name, value in part.items() if name != "architectures"}
