"""The environment of this example: a field with a hidden treasure, on which the model walks step by step."""

from typing import Any

from tandem_rollout.environments import Done

MOVES = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}


class Treasure:
    """Says after each move where the treasure is. A game has as many moves as the shortest way has."""

    def reset(self, start: list[int], treasure: list[int], **_: Any) -> str:
        """Begin a game. What this returns is added to the prompt."""
        self.place, self.treasure = list(start), list(treasure)
        self.way = self.moves_left = self._distance()
        return self._hint()

    async def step(self, message: dict[str, Any]) -> str | Done:
        """Answer a turn of the model."""
        move = MOVES.get(message["content"], (0, 0))  # any other text is a wasted move
        self.place = [here + change for here, change in zip(self.place, move, strict=True)]
        self.moves_left -= 1
        if self.moves_left:
            return self._hint()
        return Done(reward=max(0.0, 1 - self._distance() / self.way))  # the share of the way that it has come closer

    # A public method would be a tool.
    def _distance(self) -> int:
        return sum(abs(here - there) for here, there in zip(self.place, self.treasure, strict=True))

    def _hint(self) -> str:
        """Return the direction in which more of the way is left, such as ` It is north.`"""
        down, right = (there - here for here, there in zip(self.place, self.treasure, strict=True))
        if abs(down) > abs(right):
            return " It is south." if down > 0 else " It is north."
        return " It is east." if right > 0 else " It is west."
