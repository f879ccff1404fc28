"""The episodes of a run: the tools, the environment or the agent that its configuration names, loaded and checked.

A run without any of these has single turns, and none of this.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from tandem_protocol.config import SharedConfig
from tandem_protocol.config.rollout import PromptsConfig, RolloutConfig
from tandem_protocol.config.trainer import TrainerConfig

from .chat_template import render
from .environments import ClassEnvironments, RemoteEnvironments, ToolLoops
from .environments.loading import connect_environments, load_environments
from .episode import Limits, Player
from .episode_sampler import PlayGroup
from .errors import UserError
from .functions import load_function
from .prompts import PromptRow
from .rendering import Conversation, Renderer, Schema, check_template
from .tool_calls import TextParser
from .turns import TurnReader

AnyEnvironments = ToolLoops | ClassEnvironments | RemoteEnvironments


@dataclass(frozen=True)
class Episodes:
    """What plays the episodes of a run."""

    config: RolloutConfig
    shared: SharedConfig
    tokenizer: PreTrainedTokenizerBase
    environments: AnyEnvironments | None
    """None if there is an agent."""
    tool_parser: str | TextParser | None

    @property
    def schemas(self) -> Sequence[Schema]:
        """The tools of all environments. Chat templates show them to the policy."""
        return self.environments.schemas if self.environments else ()

    @property
    def brings_tools(self) -> bool:
        """Whether tools or an environment are configured, and not an agent, which brings its own."""
        return self.environments is not None

    async def start(self, *, needs_rewards: bool) -> None:
        """Create the first environments, or wait for the servers that have them.

        Args:
            needs_rewards: whether nothing else rewards the episodes.

        Raises:
            UserError: an environment cannot be created, does not follow the convention, or gives no rewards. Or a
                server cannot be used.
        """
        if self.environments is None or isinstance(self.environments, ToolLoops):
            return
        await self.environments.start()
        if needs_rewards and (without := self.environments.without_rewards):
            raise UserError(
                f"environment {without[0]} has no method get_reward, and trainer.rewards is empty, so nothing rewards "
                "its episodes. Fix: add get_reward(self) -> float to the class, or set trainer.rewards."
            )

    def check(self, prompts: PromptsConfig, rows: Iterable[PromptRow]) -> None:
        """Check that the chat template can show episodes, that tool calls can be read, and that environments fit rows.

        Raises:
            UserError: one of these fails; says what to set.
        """
        if self.environments is None:
            return
        player = self._player(prompts, self.environments, None)
        schemas, answers_in_text = self.environments.schemas, self.environments.answers_in_text
        check_template(player.renderer, schemas, answers_in_text=answers_in_text)
        if not isinstance(self.environments, ToolLoops):
            self.environments.check_rows(rows)

    async def close(self) -> None:
        """Discard the environments."""
        if self.environments:
            await self.environments.close()

    @asynccontextmanager
    async def playing(self, *prompts: PromptsConfig, max_model_len: int | None) -> AsyncIterator[list[PlayGroup]]:
        """Yield, for each of `prompts`, what plays the episodes of its rows.

        Args:
            prompts: the data sets. They may have different chat templates.
            max_model_len: longest context, in tokens.
        """
        if self.environments is not None:
            players = [self._player(one, self.environments, max_model_len) for one in prompts]
            yield [functools.partial(player.play_group, self.environments) for player in players]
            return
        from .agents import Agents, plain_messages  # needs a web server, which runs without agents do not
        from .proxy import Proxy

        name = str(self.config.agent)
        proxy = Proxy(self.shared.model)
        async with proxy.serve():
            run = load_function("agent", name)
            yield [
                Agents(
                    run=run,
                    name=name,
                    proxy=proxy,
                    renderer=(renderer := self._renderer(one)),
                    reader_for=_ReaderFor(self, renderer),
                    normalize=plain_messages,
                    limits=self._limits(max_model_len),
                    timeout_s=self.config.episode_timeout_s,
                    history=self.config.history,
                ).play_group
                for one in prompts
            ]

    def _player(self, prompts: PromptsConfig, environments: AnyEnvironments, max_model_len: int | None) -> Player:
        renderer = self._renderer(prompts)
        reader = self.reader(renderer, environments.schemas)
        return Player(renderer, reader, self._limits(max_model_len), self.config.history)

    def reader(self, renderer: Renderer, schemas: Sequence[Schema]) -> TurnReader:
        """Return what reads the turns of a policy that may call the tools of `schemas`.

        Raises:
            UserError: nothing can read its tool calls.
        """
        return TurnReader(self.tokenizer, renderer, schemas=schemas, tool_parser=self.tool_parser)

    def _limits(self, max_model_len: int | None) -> Limits:
        config = self.config
        return Limits(config.max_completion_length, config.max_turns, config.max_turn_length, max_model_len)

    def _renderer(self, prompts: PromptsConfig) -> Renderer:
        def text(messages: Conversation, tools: Sequence[Schema]) -> str:
            return render("an episode", messages, tools, self.tokenizer, prompts.chat_template_kwargs).text

        ends = {*_end_of_sequence(self.shared), *self.config.stop_token_ids}
        return Renderer(self.tokenizer, text, ends)


class _ReaderFor:
    """The readers for the tools that an agent has used. Making one takes milliseconds."""

    def __init__(self, episodes: Episodes, renderer: Renderer) -> None:
        self._episodes = episodes
        self._renderer = renderer
        self._readers: dict[str, TurnReader] = {}

    def __call__(self, schemas: Sequence[Schema]) -> TurnReader:
        key = json.dumps(list(schemas), sort_keys=True)
        if key not in self._readers:
            self._readers[key] = self._episodes.reader(self._renderer, schemas)
        return self._readers[key]


def load_episodes(
    settings: TrainerConfig, shared: SharedConfig, tokenizer: PreTrainedTokenizerBase, rank: int
) -> Episodes | None:
    """Load the functions and classes. None if the run has single turns.

    Args:
        rank: of this trainer process.

    Raises:
        UserError: one of them cannot be imported, or a tool has no types or descriptions.
    """
    config = settings.rollout
    if not config.has_episodes:
        return None
    name = config.tool_parser
    parser = load_function("tool parser", name) if name and ":" in name else name
    environments: AnyEnvironments | None = None
    if config.agent:
        load_function("agent", config.agent)
    elif config.environment_urls:
        environments = connect_environments(settings, rank)
    else:
        environments = load_environments(config)
    return Episodes(config, shared, tokenizer, environments, parser)


def _end_of_sequence(shared: SharedConfig) -> set[int]:
    """Return the tokens with which generators end a turn: those of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        file = cached_file(
            shared.model,
            name,
            revision=shared.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        ends = json.loads(Path(file).read_text()).get("eos_token_id") if file else None
        if ends is not None:
            return set(ends) if isinstance(ends, list) else {ends}
    return set()
