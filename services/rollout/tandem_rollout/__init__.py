"""From prompts to scored trajectories: environments, tools and agents on one side, token ids on the other."""
