"""GRPO with TRL: a tiny model learns to sort digits. Nothing in this file knows of Tandem."""

import argparse
from pathlib import Path

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

HERE = Path(__file__).parent


def exact_match(completions, answer, **_):
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--output_dir", default="runs/digits-grpo")
    given = parser.parse_args()
    # TRL before 0.18 has no such option: it samples only from a server.
    mode = {"vllm_mode": "server"} if "vllm_mode" in GRPOConfig.__dataclass_fields__ else {}
    trainer = GRPOTrainer(
        model=str(HERE / "model"),
        reward_funcs=exact_match,
        args=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            use_vllm=True,
            **mode,
            num_generations=16,
            per_device_train_batch_size=256,  # 16 prompts with 16 completions each
            max_completion_length=8,
            learning_rate=2e-4,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            bf16=False,
            gradient_checkpointing=False,
            save_steps=20,
            logging_steps=1,
        ),
        train_dataset=load_dataset("json", data_files=str(HERE / "prompts.jsonl"), split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
