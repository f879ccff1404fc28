"""The summary at the end of a run: a table, and a plot of the reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tandem_protocol.durations import duration

from .progress import EvalResult, Progress, StepRow, tokens_per_s
from .screen import arrow, shown

_SMOOTHING_STEPS = 10
_FILES = ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl", "reward.png", "logs")
"""What a run's folder has for a reader. Without an evaluation, one is missing."""


def show_summary(console: Console, progress: Progress, run_dir: Path) -> None:
    """Print the table and write reward.png. For a run without a step, print where its logs are."""
    steps = progress.steps.records
    if not steps:
        console.print(
            f"The run ended before its first step. Logs: {shown(run_dir / 'logs')}", soft_wrap=True, highlight=False
        )
        return
    plot_reward(progress, run_dir / "reward.png")
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title="Summary", title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, value in facts(progress):
        table.add_row(label, value)
    table.add_row("files", shown(run_dir))
    table.add_row("", "  ".join(name for name in _FILES if (run_dir / name).exists()))
    console.print(table)


def facts(progress: Progress) -> list[tuple[str, str]]:
    """Return the rows of the table: label and value."""
    steps = progress.steps.records
    duration_s = sum(step.duration_s for step in steps)
    return [
        ("steps", f"{progress.step} of {progress.max_steps} in {duration(duration_s)}"),
        ("reward", arrow(progress.rewards).plain),
        ("evaluation", arrow(progress.eval_rewards).plain),
        *pass_rates(progress.evals.records),
        ("speed", f"{tokens_per_s(steps) or 0:,.0f} tokens/s"),
        ("time", time_split(steps)),
        ("policy", f"version {progress.status.version if progress.status else steps[-1].version}"),
    ]


def pass_rates(evals: Sequence[EvalResult]) -> list[tuple[str, str]]:
    """Return the pass@k of each reward function, first and last evaluation: `0.250 → 0.750 (exact_match)`."""
    last = evals[-1].pass_at if evals else {}
    return [
        (f"pass@{k}", f"{arrow(_pass_rates_at(evals, name, k)).plain} ({name.rpartition(':')[2]})")
        for name in last
        for k in last[name]
    ]


def _pass_rates_at(evals: Sequence[EvalResult], name: str, k: str) -> list[float]:
    return [result.pass_at[name][k] for result in evals if k in result.pass_at.get(name, {})]


def time_split(steps: Sequence[StepRow]) -> str:
    """Format each phase's share of the time, largest first: `update 61%, wait for rollouts 30%`."""
    totals: dict[str, float] = {}
    for step in steps:
        for phase, seconds in step.timings.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    total_s = sum(totals.values()) or 1.0
    largest_first = sorted(totals.items(), key=lambda item: -item[1])
    return ", ".join(f"{phase.removesuffix('_s').replace('_', ' ')} {s / total_s:.0%}" for phase, s in largest_first)


def plot_reward(progress: Progress, path: Path) -> None:
    """Plot the reward of every step, its moving mean, and the evaluations."""
    import matplotlib as mpl  # imported late: it takes half a second, and only the end of a run needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [s.step for s in progress.steps.records if s.reward_mean is not None]
    rewards = progress.rewards
    window = [rewards[max(0, i + 1 - _SMOOTHING_STEPS) : i + 1] for i in range(len(rewards))]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, rewards, color="#9ecae1", linewidth=1, label="reward, mean per step")
    axes.plot(steps, [sum(w) / len(w) for w in window], color="#2171b5", linewidth=2, label="moving mean")
    if evals := progress.evals.records:
        axes.plot([e.step for e in evals], [e.reward_mean for e in evals], "o", color="#cb181d", label="evaluation")
    axes.set(xlabel="step", ylabel="reward")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
