"""The agent of this example, written with the library `openai-agents`.

A receptionist hands each question over to one of two colleagues. Both are agents too, and all three are the model that
is trained: every call of the library goes to the trainer's own endpoint, which records what the model samples.
"""

from typing import Any

from agents import Agent, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool
from agents.exceptions import MaxTurnsExceeded, ModelBehaviorError

from tandem_rollout.agents import AgentClient


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


@function_tool
def reverse(word: str) -> str:
    """Spell a word backwards.

    Args:
        word: the word
    """
    return word[::-1]


async def run(row: dict[str, Any], client: AgentClient) -> float:
    """Answer a question, and return the reward: 1 for the right answer."""
    async with client.openai() as connected:
        model = OpenAIChatCompletionsModel(client.model, connected)
        numbers = Agent(name="numbers", model=model, tools=[add], tool_use_behavior="stop_on_first_tool")
        words = Agent(name="words", model=model, tools=[reverse], tool_use_behavior="stop_on_first_tool")
        receptionist = Agent(name="receptionist", model=model, handoffs=[numbers, words])
        try:
            result = await Runner.run(
                receptionist, row["prompt"], run_config=RunConfig(tracing_disabled=True), max_turns=4
            )
        except (ModelBehaviorError, MaxTurnsExceeded):  # for example, a tool that does not exist
            return 0.0
    return float(str(result.final_output) == row["answer"])
