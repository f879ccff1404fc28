"""The rollout side: from prompts to scored trajectories. It samples from the generators, and never imports torch."""
