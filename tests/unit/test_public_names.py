"""The names that projects import, and the sections of config.yaml."""

from __future__ import annotations

import pytest

from tandem_protocol.config import SECTIONS
from tandem_protocol.config.project import ProjectSettings
from tandem_rollout import rewards
from tandem_rollout.errors import UserError
from tandem_rollout.functions import is_sandboxed, load_function

READY = sorted(set(rewards.__all__) - {"sandboxed"})


@pytest.mark.parametrize("name", READY)
def test_the_former_name_of_a_ready_made_reward_is_the_same_function(name: str) -> None:
    now, before = (
        load_function("reward", f"{module}:{name}")
        for module in ("tandem_rollout.rewards", "tandem_trainer.ready_rewards")
    )
    assert now is before


def test_a_function_decorated_under_the_former_name_runs_in_the_sandbox() -> None:
    from tandem_trainer.functions import sandboxed

    assert is_sandboxed(sandboxed(lambda: None))


def test_an_unknown_ready_made_reward_is_answered_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=f"expected one of: {', '.join(READY)}"):
        load_function("reward", "tandem_rollout.rewards:exact_mach")


def test_every_section_has_its_model() -> None:
    assert tuple(ProjectSettings.model_fields) == SECTIONS
