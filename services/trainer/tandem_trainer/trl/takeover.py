"""Put Tandem's client in the place of TRL's, in every trainer that a script makes."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from packaging.specifiers import SpecifierSet
from transformers import Trainer

from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.trl import TrlSettings
from tandem_protocol.script import run_name

from ..devices import train_on_cpu_without_accelerator
from .client import TandemClient
from .last_step import LastStep
from .recorder import RecordedClient, Recorder, Tally
from .start import Start

CLIENT_MODULES = ("trl.generation.vllm_client", "trl.extras.vllm_client")
"""The modules that define TRL's client, since TRL 0.29 and before."""
GENERATION = "vllm_generation"
"""The module beside the client that makes it for most trainers. Some import it only after `Trainer.__init__`."""
SUPPORTED = (SpecifierSet(">=0.16,<0.23"), SpecifierSet(">=1.1"))
"""The versions between them expect other answers, and some import vLLM also for the server mode."""
TESTED = SpecifierSet("<1.17")
"""A newer version is accepted with a warning."""
EXPECTED = "0.16 to 0.22, or 1.1 to 1.16"

log = logging.getLogger(__name__)

_installed: list[type[RecordedClient]] = []


def use(weights_dir: str | Path | None = None, *, config: Path | None = None, start: Start | None = None) -> None:
    """From now on, TRL's trainers with `use_vllm=True, vllm_mode="server"` use Tandem's generators.

    Args:
        weights_dir: Directory of the weight store. None: `TANDEM__SHARED__WEIGHTS_DIR`, or `weights`.
        config: YAML file with the sections `shared` and `trainer`. None: no file.
        start: How `python -m tandem_trainer.trl` was started.

    Raises:
        ConfigError: TRL is missing, this version of it is not supported, or an environment variable is invalid.
    """
    given = {"shared.weights_dir": str(weights_dir)} if weights_dir else {}
    settings, sources = load(TrlSettings, path=config, overrides=given, defaults={"shared.model": "the script's"})
    if not _installed:
        name, original = _find_client()
        members = {"original": original, "__module__": __name__, "tally": Tally()}
        client = type("VLLMClient", (RecordedClient,), members | {"is_rehearsal": bool(start and start.is_rehearsal)})
        vars(sys.modules[name])["VLLMClient"] = client
        _wrap_trainers(client, start, sys.modules["trl"].__version__)
        train_on_cpu_without_accelerator()
        _installed.append(client)
    _installed[0].settings = settings
    run = settings.trainer.run_name or run_name(sys.argv[0])
    _installed[0].run_dir = (settings.trainer.output_dir / run).absolute()
    _installed[0].generators = settings.shared.generators if "shared.generators" in sources else ()


def _find_client() -> tuple[str, type[Any]]:
    """Return the module of TRL's client, and the client.

    Raises:
        ConfigError: TRL is missing, or this version is not supported.
    """
    try:
        version = importlib.import_module("trl").__version__
    except ModuleNotFoundError as error:
        raise ConfigError(f"TRL cannot be imported: {error}. Fix: pip install trl.") from error
    expected = f"expected {EXPECTED}. Fix: install one of these"
    if not any(versions.contains(version, prereleases=True) for versions in SUPPORTED):
        raise ConfigError(f"got TRL {version}, {expected}.")
    name = next(name for name in CLIENT_MODULES if importlib.util.find_spec(name.rpartition(".")[0]))
    client: type[Any] = importlib.import_module(name).VLLMClient
    if importlib.util.find_spec(generation := name.replace("vllm_client", GENERATION)):
        importlib.import_module(generation)
    if unknown := [method for method in vars(client) if method[0] != "_" and not hasattr(TandemClient, method)]:
        raise ConfigError(
            f"got TRL {version}, whose client has the methods {', '.join(unknown)} that Tandem lacks; {expected}."
        )
    if not TESTED.contains(version, prereleases=True):
        log.warning("got TRL %s, which is newer than the tested versions; %s, if something fails.", version, expected)
    return name, client


def _wrap_trainers(client: type[RecordedClient], start: Start | None, release: str) -> None:
    """Change the base class of all trainers.

    A trainer of TRL makes its client after `Trainer.__init__`. By then, its modules are imported, so none has to be
    imported just to be changed.
    """
    init, train = Trainer.__init__, Trainer.train

    @functools.wraps(init)
    def wrapped_init(self: Any, *args: Any, **kwargs: Any) -> None:
        _refuse_asynchronous(type(self))
        _replace_names(client)
        init(self, *args, **kwargs)
        client.trainer = weakref.ref(self)
        if getattr(self.args, "use_vllm", False) and getattr(self.args, "vllm_mode", "server") == "server":
            self.add_callback(LastStep(self, release))
            self.add_callback(Recorder(self, client.tally, client.run_dir))

    @functools.wraps(train)
    def wrapped_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(train, self)
        try:
            return start.train(self, client.stop, run, *args, **kwargs) if start else run(*args, **kwargs)
        except BaseException as error:
            for recorder in [found for found in self.callback_handler.callbacks if isinstance(found, Recorder)]:
                recorder.end_with(error)
            raise

    Trainer.__init__, Trainer.train = wrapped_init, wrapped_train


def _refuse_asynchronous(trainer: type[Any]) -> None:
    if any(cls.__module__.startswith("trl.") and ".async_" in cls.__module__ for cls in trainer.__mro__):
        raise ConfigError(
            f"got {trainer.__name__}, whose workers talk to vLLM themselves; expected a synchronous trainer. Fix: use "
            "GRPOTrainer, or Tandem's own trainer with max_lag 1, which samples during the update."
        )


def _replace_names(client: type[TandemClient]) -> None:
    """Replace TRL's client, and its check whether vLLM is installed, in all modules of TRL that hold them."""
    for name, module in list(sys.modules.items()):
        held = vars(module) if name.startswith("trl.") else {}
        if "is_vllm_available" in held and name not in (*CLIENT_MODULES, "trl.import_utils"):
            held["is_vllm_available"] = lambda *_, **__: True
            held.setdefault("SamplingParams", SimpleNamespace)  # vLLM is not installed
            held.setdefault("LLM", _refuse_colocation)
            held.setdefault("StructuredOutputsParams", _refuse_grammar)
            held.setdefault("GuidedDecodingParams", _refuse_grammar)
        if held.get("VLLMClient") in (client.original, client):
            held["VLLMClient"] = client


def _refuse_colocation(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError("got vllm_mode='colocate', expected 'server'. Fix: set vllm_mode='server' for the trainer.")


def _refuse_grammar(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError("got structured outputs, expected none: Tandem's rollouts have no grammar. Fix: leave them out.")
