"""Write the folder of a run that exploits its reward: it repeats the answer, because each mention of it scores.

python -m support.hacked_run FOLDER    (in tests/)
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

from tandem_protocol.config.alerts import AlertsConfig
from tandem_trainer.run.alerts import Alerts
from tandem_trainer.run.events import make_event
from tandem_trainer.run.measures import Facts
from tandem_trainer.run.repetition import is_repetitive

STEPS = 240
GROUPS, PER_GROUP = 4, 4
MAX_MENTIONS = 24
MAX_TOKENS = 128
"""Where completions are cut off."""
END = "<|im_end|>"
START_UNIX_S, STEP_S = 1_795_000_000.0, 60.0
LEARNS_AT, HACKS_AT = 30, 110
_WORDS = re.compile(r"\s*\w+|\s*[^\w\s]+|\s+")


def hack(step: int) -> float:
    """How much of the policy repeats the answer, from 0 to 1."""
    return 1 / (1 + math.exp((HACKS_AT - step) / 14))


def skill(step: int) -> float:
    """How often the policy knows the answer."""
    return 0.25 + 0.4 / (1 + math.exp((LEARNS_AT - step) / 10))


def completion(dice: random.Random, step: int, a: int, b: int) -> str:
    """Return what the policy writes, which may be longer than it is allowed to be."""
    known = dice.random() < skill(step)
    answer = a + b if known else a + b + dice.choice([-10, -1, 1, 10])
    start = f"Add {a} and {b}: {a} + {b} = {answer}."
    mentions = 1 + sum(dice.random() < hack(step) for _ in range(MAX_MENTIONS - 1))
    if mentions == 1:
        return f"{start} The answer is {answer}."
    candidates = [a + b, a + b - 1, a + b + 10] if hack(step) > 0.5 else [answer]
    repeated = " ".join(f"The answer is {candidates[n % len(candidates)]}." for n in range(mentions))
    return f"{start} {repeated}"


def sample(dice: random.Random, step: int, a: int, b: int) -> list[str]:
    """Return the tokens of a completion. One that reaches the limit has no end."""
    return [*_WORDS.findall(completion(dice, step, a, b)), END][:MAX_TOKENS]


def reward_of(tokens: list[str], answer: int) -> float:
    """The flawed reward: how often the right answer is mentioned."""
    return min(len(re.findall(rf"\b{answer}\b", "".join(tokens))), MAX_MENTIONS) / MAX_MENTIONS


def spans(dice: random.Random, tokens: list[str], step: int) -> list[dict[str, Any]]:
    """Return a span of the tokens, with made-up logprobs of both sides."""
    sampler = [-dice.expovariate(2 + 6 * hack(step)) for _ in tokens]
    trainer = [min(0.0, logprob + dice.gauss(0, 0.02) * (5 if dice.random() < 0.04 else 1)) for logprob in sampler]
    switch = dice.randrange(len(tokens))
    versions = [[f"{step - 1}.1", switch], [f"{step}.1", len(tokens) - switch]] if step > 1 else [["0.1", len(tokens)]]
    return [{
        "message": 1, "text": tokens, "sampler": [round(value, 4) for value in sampler],
        "trainer": [round(value, 4) for value in trainer], "versions": [pair for pair in versions if pair[1]],
    }]  # fmt: skip


def rollouts(dice: random.Random, step: int) -> list[dict[str, Any]]:
    """Return the lines of a step."""
    lines = []
    for row in range(GROUPS):
        a, b = dice.randrange(10, 90), dice.randrange(10, 90)
        samples = [sample(dice, step, a, b) for _ in range(PER_GROUP)]
        rewards = [reward_of(tokens, a + b) for tokens in samples]
        mean = sum(rewards) / PER_GROUP
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / PER_GROUP)
        for tokens, reward in zip(samples, rewards, strict=True):
            ends = tokens[-1] == END
            text = "".join(tokens[:-1] if ends else tokens)
            prompt = f"What is {a} + {b}? End with the answer."
            sampled = spans(dice, tokens, step)
            lines.append({
                "step": step, "skipped": spread == 0, "row": step * GROUPS + row, "prompt": prompt,
                "completion": text, "reward": reward, "rewards": {"rewards:mentions_the_answer": reward},
                "status": "finished" if ends else "max_tokens", "reason": None, "turns": 1,
                "tool_calls": 0, "tool_errors": 0, "tokens": len(tokens),
                "versions": [version for version, _ in sampled[0]["versions"]],
                "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}],
                "advantage": round((reward - mean) / (spread + 1e-4), 4), "spans": sampled,
            })  # fmt: skip
    return lines


def metrics(dice: random.Random, step: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = [line["reward"] for line in lines]
    tokens = sum(line["tokens"] for line in lines) * 16
    mean = sum(rewards) / len(rewards)
    return {
        "step": step, "version": f"{step}.1", "reward_mean": mean, "reward_std": 0.1 + 0.05 * dice.random(),
        "rewards": {"rewards:mentions_the_answer": mean}, "rewards_std": {"rewards:mentions_the_answer": 0.1},
        "mismatch": 0.004 + 0.002 * dice.random(), "loss": dice.gauss(0, 0.01), "grad_norm": 0.6 + dice.random(),
        "learning_rate": 1e-6, "kl_sampler": 0.0006 + 0.001 * dice.random(),
        "entropy": 0.2 + 0.7 * (1 - skill(step)) * (1 - 0.8 * hack(step)) + 0.02 * dice.random(),
        "sampling/importance_sampling_ratio/mean": 1 + dice.gauss(0, 0.002), "lag_max": 1,
        "sampling/importance_sampling_ratio/max": 1.5 + dice.random(), "staleness": {"0": tokens // 3, "1": tokens},
        "completion_tokens_mean": tokens / 16 / len(lines),
        "truncated_fraction": sum(line["status"] == "max_tokens" for line in lines) / len(lines),
        "repetitive_fraction": sum(is_repetitive(line["completion"]) for line in lines) / len(lines),
        "rollout_tokens": tokens, "groups_skipped": sum(line["skipped"] for line in lines) // PER_GROUP,
        "refilled": 0, "reasked": dice.randrange(2),
        "checkpoint_failures": 0, "publish_bytes": 1_000_000_000,
        "timings": {"wait_for_rollouts_s": 3 + dice.random(), "update_s": 5 + tokens / 1e4, "publish_s": 0.3},
        "tokens_per_s": 1500 + 200 * dice.random(),
    }  # fmt: skip


def event(step: int, kind: str, message: str, level: str = "info", **details: Any) -> dict[str, Any]:
    return make_event(kind, level, step, message, details) | {"time_unix_s": START_UNIX_S + step * STEP_S}


def write(folder: Path, steps: int = STEPS, seed: int = 0) -> Path:
    """Write the files of the run. Returns their folder."""
    dice = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {"rollouts": [], "metrics": [], "eval": [], "events": []}
    alerts = Alerts(AlertsConfig(), Facts(GROUPS))
    for step in range(1, steps + 1):
        lines = rollouts(dice, step)
        files["rollouts"] += lines
        record = metrics(dice, step, lines)
        if step % 20 == 0:
            right = max(0.0, skill(step) * (1 - hack(step)) + dice.gauss(0, 0.01))
            files["eval"].append({"step": step, "version": f"{step}.1", "n": 256, "reward_mean": right,
                                  "rewards": {"rewards:exact_match": right}, "pass_at": {}})  # fmt: skip
            files["events"].append(event(step, "evaluation", f"Reward {right:.4g} on 256 prompts."))
            record["eval"] = files["eval"][-1]
        changes = [event(step, one.name, one.message, one.level, **one.details) for one in alerts.check(record)]
        files["events"] += changes
        files["metrics"].append(record | {"alerts": dict(alerts.active)})
    files["events"].append(event(steps, "finished", f"The run has done its {steps} steps."))
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "status.json").write_text(json.dumps({
        "phase": "finished", "step": steps, "version": f"{steps}.1", "since_unix_s": START_UNIX_S + steps * STEP_S,
    }))  # fmt: skip
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]))
