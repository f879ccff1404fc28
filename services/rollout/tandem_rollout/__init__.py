"""The rollout side: from prompts to scored groups. It samples from the generators, and never imports torch."""
