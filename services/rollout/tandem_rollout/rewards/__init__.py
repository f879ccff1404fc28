"""Reward functions: how they are called and isolated, and some that are ready to use."""
