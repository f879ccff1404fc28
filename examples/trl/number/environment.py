"""GRPO with tools that have a state: the model guesses a number. Nothing in this file knows of Tandem.

It needs a model with a chat template for tools, such as Qwen3. The default comes from the Hugging Face hub.
"""

import argparse
import random

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

RULES = "I have a number between 1 and 20. Call the tool `guess` until you have found it."


class Number:
    """One game. Its public methods are the model's tools."""

    def reset(self, number, **_):
        self.number, self.guesses, self.found = number, 0, False

    def guess(self, number: int) -> str:
        """Compare a guess with the number.

        Args:
            number: The guess.

        Returns:
            "higher", "lower" or "right".
        """
        self.guesses += 1
        self.found = number == self.number
        return "right" if self.found else "higher" if number < self.number else "lower"


def few_guesses(environments, **_):
    return [1.0 / game.guesses if game.found else 0.0 for game in environments]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--output_dir", default="runs/number-grpo")
    parser.add_argument("--max_completion_length", type=int, default=512)
    given = parser.parse_args()
    numbers = [random.Random(place).randint(1, 20) for place in range(1000)]
    trainer = GRPOTrainer(
        model=given.model,
        reward_funcs=few_guesses,
        environment_factory=Number,
        args=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            use_vllm=True,
            vllm_mode="server",
            num_generations=8,
            per_device_train_batch_size=8,
            max_completion_length=given.max_completion_length,
            max_tool_calling_iterations=8,
            chat_template_kwargs={"enable_thinking": False},
            bf16=torch.cuda.is_available(),
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": RULES}], "number": number} for number in numbers]
        ),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
