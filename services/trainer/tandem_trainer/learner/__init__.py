"""The update of the policy: the model, its logprobs, the optimizer, sharding and LoRA."""
