"""The completions of one prompt with their rewards: what the rollout side hands to the learner."""

from __future__ import annotations

from tandem_protocol.messages import Group, Message


class ScoredGroup(Message):
    """All completions of one prompt, with their rewards. It is a `Message`, so a checkpoint can store it as JSON."""

    row: int
    """Index of the prompt in the data set."""
    prompt_ids: tuple[int, ...]
    prompt_text: str
    texts: tuple[str, ...]
    """Text of each completion, without special tokens."""
    group: Group
    rewards: tuple[float | None, ...]
    """Per completion: the weighted sum over the reward functions, or None if no function gave a reward."""
    rewards_by_function: dict[str, tuple[float | None, ...]]
    """Name of the function → its reward for each completion, without the weight."""

    @property
    def oldest_step(self) -> int:
        """Version step of the oldest policy that sampled any token of the group."""
        return oldest_step(self.group)

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ. If all are equal, every advantage is 0."""
        return len({reward for reward in self.rewards if reward is not None}) > 1


def oldest_step(group: Group) -> int:
    """Return the version step of the oldest policy that sampled any token of `group`."""
    return min(span.version.step for completion in group.completions for span in completion.versions)
