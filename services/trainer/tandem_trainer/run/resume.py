"""Which settings may change between a checkpoint and the run that resumes from it.

A changed setting either takes effect when the run is resumed, or is refused with a reason. A checkpoint holds moments,
counts and rollouts. Settings always come from the configuration.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tandem_protocol.config import resolved
from tandem_protocol.config.trainer import TrainerSettings
from tandem_protocol.manifest import Digest
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptRow

MODEL = "the model's fingerprint"
PROCESSES = "the number of trainer processes"
PROMPT_COUNT = "the number of prompts"
PROMPTS = "the prompts and their columns"
EVAL_PROMPTS = "the evaluation's prompts and their columns"
CODE = "the project's code"

FIXED = {
    "shared.model": "the checkpoint holds this model's weights and tokenizer",
    "shared.revision": "the checkpoint holds this model's weights and tokenizer",
    MODEL: "the checkpoint holds this model's weights and tokenizer",
    PROCESSES: "each process keeps its own place in the prompts and its own rollouts",
    PROMPT_COUNT: "the order of the prompts follows from their number",
    "trainer.lora": "the checkpoint holds the parameters of this adapter",
    "trainer.optim.name": "the two optimizers keep different states",
}
"""Setting → why a change of it, or of a setting below it, is refused. All other changes take effect."""

SCORING = ("trainer.rewards", "trainer.online_dpo.judge", PROMPTS, CODE)
"""If one of these changes, a completion may get another reward, and an episode may take another course."""
SAMPLING = (
    "trainer.rollout.num_generations",
    "trainer.rollout.max_completion_length",
    "trainer.rollout.temperature",
    "trainer.rollout.top_p",
    "trainer.rollout.top_k",
    "trainer.rollout.min_p",
    "trainer.rollout.repetition_penalty",
    "trainer.rollout.stop_token_ids",
    "trainer.rollout.tools",
    "trainer.rollout.environment",
    "trainer.rollout.agent",
    "trainer.rollout.max_turns",
    "trainer.rollout.max_turn_length",
    "trainer.rollout.max_tool_characters",
    "trainer.rollout.tool_parser",
    "trainer.rollout.history",
)
"""If one of these changes, completions come from another distribution."""
EVALUATION = (
    "trainer.rewards", "trainer.online_dpo.judge", "trainer.eval.temperature", "trainer.eval.num_generations",
    "trainer.rollout.environment", "trainer.rollout.agent", EVAL_PROMPTS, CODE,
)  # fmt: skip
"""If one of these changes, the reward of an evaluation does not compare with earlier ones."""

_OPAQUE = frozenset({MODEL, PROMPTS, EVAL_PROMPTS, CODE})
"""These values are digests. Messages do not show them."""
_NOT_SET = "not set"
_LONGEST = 200


class Change(NamedTuple):
    """One setting or fact that has changed since the checkpoint."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        if self.key in _OPAQUE:
            return f"{self.key} changed"
        return f"{self.key}: {_text(self.before)} → {_text(self.now)}"


class Changes(tuple[Change, ...]):
    """All changes since the checkpoint."""

    def touch(self, keys: Iterable[str]) -> bool:
        """True if one of `keys`, or a setting below it, is among them."""
        return any(_is_below(change.key, key) for change in self for key in keys)


def describe(
    settings: TrainerSettings,
    *,
    processes: int,
    fingerprint: Mapping[str, Any],
    rows: Sequence[PromptRow],
    eval_rows: Sequence[PromptRow],
) -> dict[str, Any]:
    """Collect every setting, and the facts about model, prompts and code that a checkpoint depends on."""
    facts = {
        MODEL: dict(fingerprint),
        PROCESSES: processes,
        PROMPT_COUNT: len(rows),
        PROMPTS: _rows_digest(rows),
        EVAL_PROMPTS: _rows_digest(eval_rows),
        CODE: _code_digest(Path.cwd(), settings.trainer.functions),
    }
    return {row.key: row.value for row in resolved(settings, {})} | facts


def compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> Changes:
    """Return what changed since the checkpoint of the run in `folder`.

    Raises:
        UserError: something in `FIXED` changed.
    """
    keys = [key for key in {**now, **before} if before.get(key, _NOT_SET) != now.get(key, _NOT_SET)]
    # If an optional section is added or removed, leave out the section itself: `trainer.lora: null` beside
    # `trainer.lora.r: 16`.
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    changes = Changes(Change(key, before.get(key, _NOT_SET), now.get(key, _NOT_SET)) for key in keys)
    refused: dict[str, list[Change]] = {}
    for change in changes:
        for key, reason in FIXED.items():
            if _is_below(change.key, key):
                refused.setdefault(reason, []).append(change)
    if refused:
        raise UserError(
            "; ".join(f"{'; '.join(map(str, several))}, but {reason}" for reason, several in refused.items())
            + f". {folder} holds a run with other settings. Fix: change them back to continue that run"
            + "".join(f" ({_how_to_set_back(change)})" for change in changes if change.key == PROCESSES)
            + ", or choose another trainer.run_name to start a new one."
        )
    return changes


def _how_to_set_back(processes: Change) -> str:
    """Name the variable that sets the number of processes, because config.yaml has no key for it."""
    return f"TANDEM_TRAINER_PROCESSES={processes.before}, divided by the number of nodes if there are several"


def _is_below(key: str, parent: str) -> bool:
    return key == parent or key.startswith(f"{parent}.")


def _text(value: Any) -> str:
    text = value if value is _NOT_SET else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _rows_digest(rows: Sequence[PromptRow]) -> str:
    digest = Digest()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.token_ids, row.columns], sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _code_digest(project: Path, functions: Iterable[str]) -> str:
    """Digest of the project's code: of all loaded modules in its folder, and of the modules of `functions`."""
    named = {function.partition(":")[0] for function in functions}
    digest = Digest()
    for name, module in sorted(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        is_ours = file.is_relative_to(project) and "site-packages" not in file.parts
        if (is_ours or name in named) and file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
