"""Online RL training: asks generators for rollouts, updates the policy, publishes it."""
