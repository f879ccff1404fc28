"""GRPO as in TRL's documentation: conversations, several rewards, and the default precision and logging."""

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

dataset = Dataset.from_list(
    [
        {
            "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{i}+{i}"}],
            "solution": str(2 * i),
            "task": "math" if i % 2 else "code",
        }
        for i in range(32)
    ]
)


def format_reward(completions, **kwargs):
    assert kwargs["trainer_state"].global_step >= 0
    return [float(len({*completion[0]["content"]})) for completion in completions]


def math_reward(prompts, completions, completion_ids, solution, task, **kwargs):
    assert [prompt[1]["content"].split("+")[0] for prompt in prompts] == [str(int(s) // 2) for s in solution]
    contents = [completion[0]["content"] for completion in completions]
    return [
        float(s in content) if t == "math" else None for s, t, content in zip(solution, task, contents, strict=True)
    ]


async def async_reward(completion_ids, **kwargs):
    return [len(ids) / 10 for ids in completion_ids]


trainer = GRPOTrainer(
    model="model",
    reward_funcs=[format_reward, math_reward, async_reward],
    args=GRPOConfig(
        output_dir="out",
        use_vllm=True,
        vllm_mode="server",
        max_steps=3,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=12,
        reward_weights=[0.5, 1.0, 2.0],
        log_completions=True,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()
