"""Where episodes take place: single turns, tools, and environment classes of the project."""

from .base import Done, Environment, EnvironmentFailed, EnvironmentLost, Environments, Row, Start, Step
from .classes import ClassEnvironments
from .remote import RemoteEnvironments
from .single_turn import SingleTurns
from .tool_loop import ToolLoops

__all__ = [
    "ClassEnvironments",
    "Done",
    "Environment",
    "EnvironmentFailed",
    "EnvironmentLost",
    "Environments",
    "RemoteEnvironments",
    "Row",
    "SingleTurns",
    "Start",
    "Step",
    "ToolLoops",
]
