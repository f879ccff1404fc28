"""A plain TRL script, as a user has it. It knows nothing of Tandem."""

import argparse
import inspect

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--trainer", default="grpo")
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--mode", default="server")
parser.add_argument("--lora", action="store_true")
args = parser.parse_args()


def variety(completions, **_):
    return [float(len(set(completion))) for completion in completions]


peft = {}
if args.lora:
    from peft import LoraConfig

    peft["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

if args.trainer == "grpo":
    from trl import GRPOConfig as Config
    from trl import GRPOTrainer as Trainer
elif args.trainer == "rloo":
    from trl import RLOOConfig as Config
    from trl import RLOOTrainer as Trainer
elif args.trainer == "online_dpo":
    from trl.experimental.online_dpo import OnlineDPOConfig as Config
    from trl.experimental.online_dpo import OnlineDPOTrainer as Trainer
else:
    from trl.experimental.async_grpo import AsyncGRPOConfig as Config
    from trl.experimental.async_grpo import AsyncGRPOTrainer as Trainer

options = {
    "output_dir": args.out, "max_steps": args.steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
    "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_vllm": True,
    "vllm_mode": args.mode, "vllm_server_host": "127.0.0.1", "vllm_server_port": args.port, "num_generations": 4,
    "max_completion_length": 12, "max_new_tokens": 12, "temperature": 0.9,
}  # fmt: skip
if args.trainer == "online_dpo":
    del options["num_generations"]
known = inspect.signature(Config).parameters
trainer = Trainer(
    model=args.model if args.trainer == "async" else AutoModelForCausalLM.from_pretrained(args.model),
    reward_funcs=variety,
    args=Config(**{name: value for name, value in options.items() if name in known}),
    train_dataset=Dataset.from_dict({"prompt": [f"{n}+{n}=" for n in range(10)] * 4}),
    processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
    **peft,
)
trainer.train()
trainer.save_model(args.out)
