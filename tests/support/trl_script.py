"""A plain TRL script, as a user has it. It knows nothing of Tandem."""

import argparse
import inspect
import json
import os
import time
import urllib.request
import zlib
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--trainers", nargs="+", default=["grpo"], help="grpo, lora, rloo, online_dpo or async")
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True, help="each trainer saves its model into OUT/TRAINER")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--mode", default="server")
parser.add_argument("--length", type=int, help="exact length of the completions; default: up to 12")
parser.add_argument("--greedy", help="file for greedy tokens of the server and of the model, before each update")
parser.add_argument("--wait-for-death", type=int, help="wait in this step until the server is dead")
args = parser.parse_args()
SERVER = f"http://127.0.0.1:{args.port}"
PROMPTS = [[5, 9, 13], [7, 20, 31, 8], [40, 41, 42, 43, 44]]
LENGTH = 12


def never_equal(completions, **_):
    step = trainer.state.global_step
    if args.greedy:
        write_greedy(step)
    if step == args.wait_for_death:
        wait_for_death()
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]


def write_greedy(step):
    line = {"step": step, "server": [server_greedy(ids) for ids in PROMPTS], "model": [greedy(ids) for ids in PROMPTS]}
    with Path(args.greedy).open("a") as file:
        file.write(json.dumps(line) + "\n")


def server_greedy(ids):
    body = {"prompt": ids, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body["model"] = args.model
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['TANDEM_TOKEN']}"}
    request = urllib.request.Request(f"{SERVER}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["token_ids"]


@torch.no_grad()
def greedy(ids):
    tokens = torch.tensor([ids])
    for _ in range(LENGTH):
        tokens = torch.cat([tokens, trainer.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(ids) :].tolist()


def wait_for_death():
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{SERVER}/health", timeout=5).close()
        except OSError:
            return
        time.sleep(0.05)
    raise TimeoutError("the server lives")


def make(kind):
    peft = {}
    if kind == "lora":
        from peft import LoraConfig

        peft["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if kind == "rloo":
        from trl import RLOOConfig as Config
        from trl import RLOOTrainer as Trainer
    elif kind == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig as Config
        from trl.experimental.online_dpo import OnlineDPOTrainer as Trainer
    elif kind == "async":
        from trl.experimental.async_grpo import AsyncGRPOConfig as Config
        from trl.experimental.async_grpo import AsyncGRPOTrainer as Trainer
    else:
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer

    options = {
        "output_dir": f"{args.out}/{kind}", "max_steps": args.steps, "per_device_train_batch_size": 4, "use_cpu": True,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "bf16": False, "logging_steps": 1,
        "report_to": [], "save_strategy": "no",
        "use_vllm": True, "vllm_mode": args.mode, "vllm_server_host": "127.0.0.1", "vllm_server_port": args.port,
        "max_completion_length": args.length or 12, "max_new_tokens": 12, "temperature": 0.9,
        "generation_kwargs": {"ignore_eos": bool(args.length)},
    }  # fmt: skip
    if kind != "online_dpo":
        options["num_generations"] = 4
    known = inspect.signature(Config).parameters
    return Trainer(
        model=args.model if kind == "async" else AutoModelForCausalLM.from_pretrained(args.model),
        reward_funcs=never_equal,
        args=Config(**{name: value for name, value in options.items() if name in known}),
        train_dataset=Dataset.from_dict({"prompt": [f"{n}+{n}=" for n in range(10)] * 4}),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        **peft,
    )


for kind in args.trainers:
    trainer = make(kind)
    trainer.train()
    trainer.save_model(f"{args.out}/{kind}")
    if args.greedy:
        write_greedy(trainer.state.global_step)
