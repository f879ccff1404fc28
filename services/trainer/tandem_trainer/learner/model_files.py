"""The files of a model besides its weights, which make a checkpoint or an export a complete Hugging Face folder.

They are copies of the user's files. `transformers` would write different ones: it drops settings that it does not know,
and refuses those that it considers wrong, such as Vicuna's `generation_config.json`.
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
from tandem_rollout.errors import UserError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_COPIED = re.compile(r".+\.(json|jinja|txt|model|tiktoken|vocab|bpe|spm|py)|(LICENSE|NOTICE).*")
"""Files of tokenizers and configurations, their code, and licences."""
_NOT_COPIED = re.compile(r"\..*|config\.json|.*\.index\.json|adapter_.*|trainer_state\.json|.*_results\.json")
"""Files that another training tool has left there, and files that we write ourselves."""
_MAX_BYTES = 1 << 28
"""Larger files are not copied, because they are data."""
_TEMPLATES = "additional_chat_templates"
_PROBE = "The café's bill:\n\t12 + 345 = 357 €  漢字 🙂 <|x|> def f(a, b):"
"""A text that two different tokenizers are likely to split differently."""


def model_dir(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder with the files of a model: the given directory, or one in the hub's cache."""
    return Path(cached_file(source, CONFIG, revision=revision)).parent


class ModelFiles:
    """The files of one model besides its weights, collected before the first step."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shared: SharedConfig, dtype: str = "float32"
    ) -> None:
        """Collect the files of `shared.model`, and check that the copies can be loaded.

        Args:
            model: the model that was loaded from `shared.model`.
            tokenizer: the tokenizer that was loaded from `shared.model`.
            dtype: dtype of the weights that will be saved with these files.

        Raises:
            UserError: the copies cannot be loaded, or give a different tokenizer.
        """
        self._folder = TemporaryDirectory(prefix="tandem-model-files-")  # deleted together with this object
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
        """Write the files into `directory`.

        Args:
            adapter: leave out config.json, because a folder that has one counts as a complete model.

        Raises:
            OSError: such as ENOSPC when the disk is full.
        """
        left_out = {CONFIG, GENERATION_CONFIG} if adapter else set()
        for path in self._path.rglob("*"):
            if path.is_file() and path.name not in left_out:
                copy = directory / path.relative_to(self._path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)  # without permissions, which are those of a private folder

    def _try_config(self, shared: SharedConfig) -> None:
        try:
            AutoConfig.from_pretrained(self._path, trust_remote_code=shared.trust_remote_code)
        except Exception as error:  # the model's own code may raise anything
            raise UserError(
                f"shared.model {shared.model!r} cannot be exported: a copy of its {CONFIG} in another folder cannot be "
                f"loaded: {_reason(error)}. Fix: put every file that it names (auto_map) into the model's own "
                "directory."
            ) from error

    def _keep_tokenizer(self, tokenizer: PreTrainedTokenizerBase, shared: SharedConfig) -> None:
        """Keep the copied files if they give the same tokenizer. Otherwise let `transformers` write its files.

        A copy may give a different tokenizer, because `transformers` chooses some by the name of their folder. An
        example is `deepseek-r1-distill-llama-*`.
        """
        problem = self._tokenizer_problem(tokenizer, shared)
        if problem is None:
            return
        try:
            tokenizer.save_pretrained(self._path)
        except Exception as error:  # the tokenizer's own code may raise anything
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
            expected = _tokenizer_facts(tokenizer)
            actual = _tokenizer_facts(copy)
        except Exception as error:  # the tokenizer's own code may raise anything
            return f"it cannot be loaded: {_reason(error)}"
        return next((f"its {name} differs" for name in expected if expected[name] != actual[name]), None)


def _is_copied(path: Path) -> bool:
    name = path.name
    chosen = _COPIED.fullmatch(name) and not _NOT_COPIED.fullmatch(name)
    return bool(chosen) and path.is_file() and path.stat().st_size <= _MAX_BYTES


def _reason(error: BaseException) -> str:
    """Describe an error and its first cause, which `transformers` leaves out of its own messages."""
    first = error
    while cause := first.__cause__ or first.__context__:
        first = cause
    description = f"{type(error).__name__}: {error}"
    return description if first is error else f"{description} ({type(first).__name__}: {first})"


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocabulary": tokenizer.get_vocab(),
        "chat template": tokenizer.chat_template,
        "way to split text into tokens": tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
        "end-of-sequence token": tokenizer.eos_token_id,
    }


def _config(source: Path, model: PreTrainedModel, shared: SharedConfig) -> dict[str, Any]:
    """The user's config.json. If only the text part of a larger model is trained, the configuration of that part."""
    config: dict[str, Any] = json.loads((source / CONFIG).read_text())
    if config.get("model_type", model.config.model_type) == model.config.model_type:
        return config
    complete = AutoConfig.from_pretrained(source, trust_remote_code=shared.trust_remote_code)
    text_part: dict[str, Any] = json.loads(complete.get_text_config().to_json_string())
    return {name: value for name, value in text_part.items() if name != "architectures"}
