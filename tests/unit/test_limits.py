"""Numbers that a library would not accept later are refused at the start, with the limit."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate.utils import set_seed
from transformers import LlamaConfig

import tandem_protocol.config.generator
import tandem_protocol.config.trainer
from tandem_protocol.config import ConfigError, load
from tandem_protocol.messages import Prompt
from tandem_rollout.errors import UserError
from tandem_trainer.build import check_stop_tokens

NEEDED = {
    "shared.model": "m",
    "trainer.max_steps": "1",
    "trainer.rewards": '[{function: "r:r"}]',
}


def trainer(**overrides: str) -> tandem_protocol.config.trainer.TrainerConfig:
    given = NEEDED | {key.replace("__", "."): words for key, words in overrides.items()}
    return load(tandem_protocol.config.trainer.TrainerSettings, env={}, overrides=given)[0].trainer


@pytest.mark.parametrize(
    ("key", "words", "bound"),
    [
        ("trainer__seed", str(2**32), f"less than {2**32}"),
        ("trainer__seed", "-1", "greater than or equal to 0"),
        ("trainer__prompts__limit", str(2**63), r"below 2\*\*63"),
        ("trainer__rollout__max_completion_length", str(10**30), r"below 2\*\*63"),
        ("trainer__rollout__max_completion_length", "-5", "greater than or equal to 1"),
        ("trainer__rollout__stop_token_ids", "[1, -1]", "greater than or equal to 0"),
        ("trainer__learner__logprob_chunk_size", "0", "greater than or equal to 1"),
        ("trainer__learner__max_tokens_per_micro_batch", "0", "greater than or equal to 1"),
        ("trainer__metrics_port", "65536", "less than or equal to 65535"),
        ("trainer__metrics_port", "0", "greater than or equal to 1"),
        ("trainer__optim__learning_rate", ".inf", "finite"),
        ("trainer__rollout__timeout_s", ".nan", "finite"),
        ("shared__generators", '["http://a:65536"]', "0-65535"),
    ],
)
def test_a_number_beyond_its_limit_is_refused_with_the_limit(key: str, words: str, bound: str) -> None:
    with pytest.raises(ConfigError, match=bound) as caught:
        trainer(**{key: words})
    assert str(caught.value).startswith(key.replace("__", "."))


@pytest.mark.parametrize("port", ["65536", "-1", "1e9", "true"])
def test_an_invalid_port_of_the_generator_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match=r"^generator\.port: got "):
        load(
            tandem_protocol.config.generator.GeneratorSettings,
            env={},
            overrides={"shared.model": "m", "generator.port": port},
        )


def test_every_library_accepts_the_largest_seed() -> None:
    seed = trainer(trainer__seed=str(2**32 - 1)).seed
    before = np.random.get_state()
    set_seed(seed)
    np.random.set_state(before)


def test_a_requests_seed_leaves_room_for_its_samples() -> None:
    assert Prompt(token_ids=(1,), seed=2**62 - 1).seed == 2**62 - 1
    for seed in (-1, 2**62):
        with pytest.raises(ValueError, match="seed"):
            Prompt(token_ids=(1,), seed=seed)


def test_stop_tokens_beyond_the_vocabulary_are_refused_at_the_start() -> None:
    model = LlamaConfig(vocab_size=64)
    check_stop_tokens((0, 63), model)
    with pytest.raises(UserError, match=r"stop_token_ids contains \[64, 100\], expected ids below .* 64"):
        check_stop_tokens((1, 64, 100), model)
