"""Which versions of TRL are taken over, and how options and answers are translated. A small package stands for TRL."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from support.rollouts import completion
from tandem_protocol.config import ConfigError
from tandem_trainer.trl import __main__ as program
from tandem_trainer.trl import takeover
from tandem_trainer.trl.client import TandemClient
from tandem_trainer.trl.completions import sampling_options, shaped

CLIENT = """
class VLLMClient:
    def __init__(self, base_url=None, host="0.0.0.0", server_port=8000, group_port=51216, connection_timeout=0.0): ...
    def generate(self, prompts, n=1, max_tokens=16, logprobs=0): ...
"""

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the program does to Tandem's loggers."""
    for package in ("tandem_protocol", "tandem_rollout", "tandem_trainer"):
        logger = logging.getLogger(package)
        for name in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, name, getattr(logger, name))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package named `trl`, with a version and a client."""

    def install(version: str, client: str = CLIENT, module: str = "generation") -> None:
        folder = tmp_path / "trl" / module
        folder.mkdir(parents=True)
        (tmp_path / "trl/__init__.py").write_text(f"__version__ = {version!r}\n")
        (folder / "__init__.py").touch()
        (folder / "vllm_client.py").write_text(client)
        monkeypatch.syspath_prepend(tmp_path)

    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(takeover, "_installed", [])
    for method in ("__init__", "train"):
        monkeypatch.setattr(Trainer, method, getattr(Trainer, method))
    return install


@pytest.mark.parametrize(
    ("version", "module"),
    [("0.16.0", "extras"), ("0.22.2", "extras"), ("1.1.0", "generation"), ("1.16.0", "generation")],
)
def test_the_client_of_a_supported_version_is_replaced(install: Install, version: str, module: str):
    install(version, module=module)
    takeover.use()
    client = sys.modules[f"trl.{module}.vllm_client"].VLLMClient
    assert issubclass(client, TandemClient)
    takeover.use()
    assert sys.modules[f"trl.{module}.vllm_client"].VLLMClient is client, "a second call changes nothing"


@pytest.mark.parametrize("version", ["0.15.2", "0.23.0", "0.29.1", "1.0.0"])
def test_another_version_is_refused_and_the_message_names_those_that_work(install: Install, version: str):
    install(version)
    with pytest.raises(ConfigError, match=rf"got TRL {version}, expected 0.16 to 0.22, or 1.1 to 1.16"):
        takeover.use()


@pytest.mark.parametrize(("version", "warnings"), [("1.16.3", 0), ("1.17.0.dev0", 1), ("1.17.0", 1), ("2.0.0", 1)])
def test_a_version_that_is_newer_than_the_tested_ones_is_accepted_with_one_warning_that_names_them(
    install: Install, caplog: pytest.LogCaptureFixture, version: str, warnings: int
):
    install(version)
    takeover.use()
    takeover.use()
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(found) == warnings
    assert all(f"got TRL {version}" in message and "0.16 to 0.22, or 1.1 to 1.16" in message for message in found)


def test_a_later_version_whose_client_has_more_methods_is_refused(install: Install):
    install("1.99", CLIENT + "    def teleport(self): ...\n")
    with pytest.raises(ConfigError, match=r"got TRL 1.99, whose client has the methods teleport that Tandem lacks"):
        takeover.use()


def test_a_script_without_trl_is_told_to_install_it(install: Install, capsys: Any, tmp_path: Path):
    script = tmp_path / "train.py"
    script.touch()
    sys.modules["trl"] = None  # type: ignore[assignment]  # its import fails
    assert program.main([str(script)]) == 2
    assert "Fix: pip install trl" in capsys.readouterr().err


def test_neither_the_program_nor_the_package_imports_torch_before_a_script_runs():
    code = "import sys, tandem_trainer.trl, tandem_trainer.trl.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_script_is_a_user_error(capsys: Any):
    assert program.main(["nowhere.py"]) == 2
    assert "got nowhere.py, expected the file of a TRL script" in capsys.readouterr().err


# -- options ------------------------------------------------------------------------------------------------------


def test_options_keep_their_meaning():
    given = {"n": 4, "max_tokens": 8, "top_k": -1, "min_p": None, "logprobs": 0, "generation_kwargs": {"seed": 7}}
    seed, sampling = sampling_options(given)
    assert (seed, sampling.n, sampling.max_tokens, sampling.top_k, sampling.min_p) == (7, 4, 8, 0, 0.0)


def test_generation_kwargs_win_as_they_do_in_trl():
    _, sampling = sampling_options(
        {"max_tokens": 8, "top_p": 1.0, "generation_kwargs": {"top_p": 0.5, "detokenize": 0}}
    )
    assert sampling.top_p == 0.5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"images": [object()]}, "images"),
        ({"features": [{"image": 1}]}, "images"),
        ({"structured_outputs_regex": "[0-9]+"}, "grammars"),
        ({"guided_decoding_regex": "[0-9]+"}, "grammars"),
        ({"generation_kwargs": {"structured_outputs": {"json": {}}}}, "grammars"),
        ({"logprobs": 5}, "logprobs of other tokens"),
        ({"generation_kwargs": {"frequency_penalty": 1.0}}, "frequency_penalty: got 1.0"),
        ({"top_p": 2.0}, "top_p: got 2.0"),
    ],
)
def test_an_option_that_rollouts_do_not_have_is_refused(option: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        sampling_options({"max_tokens": 8, **option})


@pytest.mark.parametrize("option", [{"images": None}, {"images": [None, None]}, {"features": None}, {"logprobs": None}])
def test_an_option_that_is_not_used_is_accepted(option: dict[str, Any]):
    sampling_options({"max_tokens": 8, **option})


# -- answers ------------------------------------------------------------------------------------------------------


def test_completions_have_the_form_of_the_version():
    completions = [completion([5, 6]), completion([7])]
    prompts = [[1], [2]]

    def old(prompts): ...
    def new(prompts, logprobs=0): ...

    assert shaped(inspect.signature(old), prompts, completions, has_logprobs=True) == [[5, 6], [7]]
    assert shaped(inspect.signature(new), prompts, completions, has_logprobs=True) == {
        "prompt_ids": prompts,
        "completion_ids": [[5, 6], [7]],
        "logprobs": [[[-0.5], [-1.0]], [[-0.5]]],
        "logprob_token_ids": [[[5], [6]], [[7]]],
    }
    silent = shaped(inspect.signature(new), prompts, completions, has_logprobs=False)
    assert (silent["logprobs"], silent["logprob_token_ids"]) == (None, None)
