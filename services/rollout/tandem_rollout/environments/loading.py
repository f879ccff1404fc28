"""Load the tools and environments that the configuration names, or connect to the servers that have them."""

from __future__ import annotations

from collections.abc import Mapping

from tandem_protocol.config import read_environment_token
from tandem_protocol.config.rollout import RolloutConfig
from tandem_protocol.config.trainer import TrainerConfig

from ..functions import load_callable, load_function
from ..tools import Tool, Tools
from .classes import ClassEnvironments, Factory
from .remote import RemoteEnvironments
from .servers import Servers
from .tool_loop import ToolLoops


def load_environments(config: RolloutConfig) -> ToolLoops | ClassEnvironments:
    """Load the project's functions and classes.

    Raises:
        UserError: one of them cannot be imported, or a tool has no types or descriptions.
    """
    tools = [Tool.of(load_function("tool", name)) for name in config.tools]
    timeout_s, max_characters = config.tool_timeout_s, config.max_tool_characters
    factories: Factory | Mapping[str, Factory]
    if isinstance(config.environment, str):
        factories = load_callable("environment", config.environment)
    elif config.environment:
        factories = {name: load_callable("environment", place) for name, place in config.environment.items()}
    else:
        return ToolLoops(Tools(tools, timeout_s=timeout_s, max_characters=max_characters))
    return ClassEnvironments(factories, tools=tools, timeout_s=timeout_s, max_characters=max_characters)


def connect_environments(config: TrainerConfig, rank: int) -> RemoteEnvironments:
    """Return the environments of `rollout.environment_urls`. Nothing of the project is imported here.

    Args:
        rank: of this trainer process.

    Raises:
        ConfigError: the token cannot be read.
    """
    servers = Servers(
        config.rollout.environment_urls,
        read_environment_token(),
        owner=f"{config.run_name}/{rank}",
        timeout_s=config.rollout.tool_timeout_s,
        open_timeout_s=config.rollout.timeout_s,
    )
    return RemoteEnvironments(servers, start_timeout_s=config.start_timeout_s)
