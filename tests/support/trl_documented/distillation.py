"""Trainers that sample from vLLM without GRPO. The first of them imports TRL's use of vLLM only when it needs it."""

from datasets import Dataset
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

OPTIONS = {
    "use_vllm": True,
    "vllm_mode": "server",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
prompts = [[{"role": "user", "content": f"{i}*2"}] for i in range(16)]


def reward_len(completions, **kwargs):
    return [1.0 + len(completion[0]["content"]) for completion in completions]


SDPOTrainer(
    model="model",
    reward_funcs=reward_len,
    args=SDPOConfig("sdpo", num_generations=4, **OPTIONS),
    train_dataset=Dataset.from_dict({"prompt": prompts, "privileged_context": ["a hint"] * 16}),
).train()

from trl import DistillationConfig, DistillationTrainer  # noqa: E402

DistillationTrainer(
    model="model",
    teacher_model="model",
    args=DistillationConfig("distillation", **OPTIONS),
    train_dataset=Dataset.from_dict({"prompt": prompts}),
).train()
