// The charts of the overview: which figures of metrics.jsonl each shows, and what to look for.
// `fields` are names; `prefix` stands for all figures whose names begin with it. A chart without data is left out.

export const CHARTS = [
  {
    group: "Reward",
    charts: [
      {
        title: "Reward",
        fields: { reward_mean: "training", "eval.reward_mean": "evaluation" },
        hint: "Mean over all completions. A training reward that rises while the evaluation does not is being exploited, or the prompts are learned by heart.",
      },
      { title: "Reward by function", prefix: "rewards.", hint: "Before weights. One that rises while the one that you care about falls is being exploited: read completions." },
      { title: "Spread of rewards", fields: { reward_std: "standard deviation" }, hint: "Near 0, all completions score alike, and nothing can be learned from them." },
    ],
  },
  {
    group: "Policy",
    charts: [
      { title: "Entropy", fields: { entropy: "entropy" }, unit: "nats per token", hint: "Falls while the policy gets sure. Near 0 with a low reward, it has stopped exploring." },
      { title: "Completion length", fields: { completion_tokens_mean: "mean" }, unit: "tokens", hint: "If it grows with the reward, the task needs it, or the reward favours length." },
      { title: "Truncated completions", fields: { truncated_fraction: "share" }, hint: "Cut off at max_completion_length or max_turns. Below 0.1 is usual." },
      { title: "Loss", fields: { loss: "loss" }, hint: "Near 0 in GRPO. It does not measure progress; the reward does." },
      { title: "Gradient norm", fields: { grad_norm: "norm" }, hint: "Before clipping. Spikes now and then are harmless; steady growth is not." },
      { title: "Learning rate", fields: { learning_rate: "learning rate" } },
      { title: "KL to the start policy", fields: { kl_reference: "kl_reference" }, unit: "nats per token" },
      { title: "Clipped tokens", prefix: "clip_ratio/", hint: "Share of tokens whose probability has already changed by the allowed amount." },
    ],
  },
  {
    group: "Trainer and sampler",
    charts: [
      { title: "KL of sampler and trainer", fields: { kl_sampler: "kl_sampler" }, unit: "nats per token", hint: "Stays well below 0.1 and does not grow." },
      { title: "Numerical mismatch", fields: { mismatch: "mismatch" }, unit: "nats per token", hint: "With the same weights on both sides: below 0.001 in float32, below 0.05 otherwise." },
      { title: "Importance ratio", prefix: "sampling/importance_sampling_ratio/", hint: "Trainer's probability ÷ sampler's probability. The mean is close to 1." },
      { title: "Oldest token", fields: { lag_max: "lag_max" }, unit: "versions", hint: "At most trainer.max_lag." },
      { title: "Age of tokens", prefix: "staleness.", stacked: true, unit: "tokens by age in versions" },
    ],
  },
  {
    group: "Groups and episodes",
    charts: [
      {
        title: "Groups without use",
        fields: { groups_skipped: "skipped", refilled: "refilled", reasked: "asked again", episodes_failed: "episodes failed" },
        hint: "Skipped groups have equal rewards. They become more as the task is solved.",
      },
      { title: "Turns", fields: { turns_mean: "mean" } },
      { title: "Tool calls", fields: { tool_calls: "calls", tool_errors: "errors" } },
      { title: "Time in tools", fields: { environment_s_mean: "mean" }, unit: "seconds per episode" },
    ],
  },
  {
    group: "Speed",
    charts: [
      { title: "Where a step's time goes", prefix: "timings.", stacked: true, unit: "seconds", hint: "Waiting for rollouts and the update are the large ones." },
      { title: "Tokens per second", fields: { tokens_per_s: "tokens per second" }, hint: "Completion tokens, without evaluation and checkpoint." },
      { title: "Rollout tokens", fields: { rollout_tokens: "tokens" }, unit: "tokens per step" },
    ],
  },
];

// Figures that are no curve, or that a chart above shows in another way.
const NOT_SHOWN = /^(step|max_steps|attempt|reward|rewards_std\.|eval\.|checkpoint_failures$)/;

/** Return the groups of charts with all names filled in. Figures without a chart, as of a project's own loss, get one each. */
export function chartsOf(names) {
  const left = new Set(names);
  const filled = CHARTS.map(({ group, charts }) => ({
    group,
    charts: charts.map((chart) => ({ ...chart, fields: fieldsOf(chart, left) })).filter((chart) => Object.keys(chart.fields).length),
  }));
  const others = [...left].filter((name) => !NOT_SHOWN.test(name)).map((name) => ({ title: name, fields: { [name]: name } }));
  return [...filled, { group: "Other figures", charts: others }].filter(({ charts }) => charts.length);
}

function fieldsOf(chart, left) {
  const found = {};
  for (const name of chart.prefix ? [...left].filter((name) => name.startsWith(chart.prefix)) : Object.keys(chart.fields)) {
    if (!left.delete(name)) continue;
    found[name] = chart.prefix ? labelOf(name.slice(chart.prefix.length), chart.prefix) : chart.fields[name];
  }
  return found;
}

function labelOf(name, prefix) {
  if (prefix === "timings.") return name.replace(/_s$/, "").replaceAll("_", " ");
  if (prefix === "staleness.") return `age ${name}`;
  return name;
}
