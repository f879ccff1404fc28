"""Online DPO with TRL: the better of two completions is preferred. Nothing in this file knows of Tandem."""

import argparse
from itertools import pairwise
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

HERE = Path(__file__).parent


def sorted_pairs(prompts, completions, **_):
    """Share of neighbouring digits in ascending order, and less for a wrong length."""
    return [score(completion) for completion in completions]


def score(digits):
    ascending = sum(left <= right for left, right in pairwise(digits))
    return ascending / 5 - abs(len(digits) - 6)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--output_dir", default="runs/digits-online-dpo")
    given = parser.parse_args()
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(HERE / "model"),
        reward_funcs=sorted_pairs,
        args=OnlineDPOConfig(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            use_vllm=True,
            vllm_mode="server",
            per_device_train_batch_size=64,
            max_new_tokens=8,
            temperature=1.0,
            learning_rate=1e-4,
            bf16=False,
            gradient_checkpointing=False,
            save_steps=20,
            logging_steps=1,
        ),
        train_dataset=load_dataset("json", data_files=str(HERE / "prompts.jsonl"), split="train").select_columns(
            "prompt"
        ),
        processing_class=AutoTokenizer.from_pretrained(HERE / "model", padding_side="left"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
