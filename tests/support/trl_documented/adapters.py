"""GRPO with an adapter, several updates per batch, evaluations, and a second training that resumes the first."""

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer


def reward_num_unique_letters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


def make(max_steps):
    return GRPOTrainer(
        model="model",
        reward_funcs=reward_num_unique_letters,
        args=GRPOConfig(
            output_dir="out",
            use_vllm=True,
            vllm_mode="server",
            max_steps=max_steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            num_iterations=2,
            num_generations=4,
            max_completion_length=8,
            beta=0.04,
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=4,
            logging_steps=2,
            save_steps=2,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"{i}-{i}" for i in range(40)]}).to_iterable_dataset(),
        eval_dataset=Dataset.from_dict({"prompt": ["1+1", "2+2"]}),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


make(2).train()
trainer = make(5)
trainer.train(resume_from_checkpoint=True)
trainer.save_model()
