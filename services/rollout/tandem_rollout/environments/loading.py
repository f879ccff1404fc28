"""Load the tools and environments that the configuration names."""

from __future__ import annotations

from tandem_protocol.config.rollout import RolloutConfig

from ..functions import load_callable, load_function
from ..tools import Tool, Tools
from .classes import ClassEnvironments, Factory
from .tool_loop import ToolLoops


def load_environments(config: RolloutConfig) -> ToolLoops | ClassEnvironments:
    """Load the project's functions and classes.

    Raises:
        UserError: one of them cannot be imported, or a tool has no types or descriptions.
    """
    tools = [Tool.of(load_function("tool", name)) for name in config.tools]
    timeout_s, max_characters = config.tool_timeout_s, config.max_tool_characters
    if not config.environment:
        return ToolLoops(Tools(tools, timeout_s=timeout_s, max_characters=max_characters))
    factories = (
        _factory(config.environment)
        if isinstance(config.environment, str)
        else {name: _factory(function) for name, function in config.environment.items()}
    )
    return ClassEnvironments(factories, tools=tools, timeout_s=timeout_s, max_characters=max_characters)


def _factory(name: str) -> Factory:
    factory: Factory = load_callable("environment", name)
    return factory
