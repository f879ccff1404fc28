// The charts of the overview: which figures of metrics.jsonl each shows, and what to look for.
// `fields` are names; `match` stands for all figures with such a name, and its groups are what the curve is called.
// A chart without data is left out.

const words = (name) => name.replaceAll("_", " ");

export const CHARTS = [
  {
    group: "Reward",
    charts: [
      {
        title: "Reward",
        fields: { reward_mean: "training", "eval.reward_mean": "evaluation" },
        functions: { reward_mean: /^rewards\.(.+)$|^rewards\/(.+)\/mean$/, "eval.reward_mean": /^eval\.rewards\.(.+)$/ },
        hint: "Mean over all completions. If training and evaluation use different functions, compare where they go, not their values. A training reward that rises while the evaluation does not is being exploited, or the prompts are learned by heart.",
      },
      { title: "Reward by function", match: /^rewards\.(.+)$|^rewards\/(.+)\/mean$/, hint: "Before weights. One that rises while the one that you care about falls is being exploited: read completions." },
      { title: "Evaluation by function", match: /^eval\.rewards\.(.+)$|^eval\.eval_rewards\/(.+)\/mean$/, hint: "The same for held-out prompts." },
      { title: "Pass at k", match: /^eval\.pass_at\.(.+)$/, hint: "Probability that one of k completions is right, for each function and k." },
      {
        title: "Implicit rewards of pairs",
        fields: { "rewards/margins": "margin", "rewards/chosen": "preferred", "rewards/rejected": "other" },
        hint: "Of Online DPO. The margin starts at 0 and grows.",
      },
      { title: "Pairs in the right order", fields: { "rewards/accuracies": "share" }, hint: "Starts at 0.5 and rises." },
      { title: "Spread of rewards", fields: { reward_std: "standard deviation" }, hint: "Near 0, all completions score alike, and nothing can be learned from them." },
    ],
  },
  {
    group: "Policy",
    charts: [
      { title: "Entropy", fields: { entropy: "entropy" }, unit: "nats per token", hint: "Falls while the policy gets sure. Near 0 with a low reward, it has stopped exploring." },
      { title: "Completion length", fields: { completion_tokens_mean: "mean" }, unit: "tokens", hint: "If it grows with the reward, the task needs it, or the reward favours length." },
      { title: "Truncated completions", fields: { truncated_fraction: "share" }, hint: "Cut off at max_completion_length or max_turns. Below 10 % is usual." },
      { title: "Repetitive completions", fields: { repetitive_fraction: "share" }, hint: "They repeat the same text again and again. Near 0 is usual." },
      { title: "Loss", fields: { loss: "loss" }, hint: "Near 0 in GRPO. It does not measure progress; the reward does." },
      { title: "Gradient norm", fields: { grad_norm: "norm" }, hint: "Before clipping. Spikes now and then are harmless; steady growth is not." },
      { title: "Learning rate", fields: { learning_rate: "learning rate" } },
      { title: "KL to the start policy", fields: { kl_reference: "kl_reference" }, unit: "nats per token" },
      { title: "Clipped tokens", match: /^clip_ratio\/(.+)$/, hint: "Share of tokens whose probability has already changed by the allowed amount." },
    ],
  },
  {
    group: "Trainer and sampler",
    charts: [
      { title: "KL of sampler and trainer", fields: { kl_sampler: "kl_sampler" }, unit: "nats per token", hint: "Stays well below 0.1 and does not grow." },
      { title: "Numerical mismatch", fields: { mismatch: "mismatch" }, unit: "nats per token", hint: "With the same weights on both sides: below 0.001 in float32, below 0.05 otherwise." },
      { title: "Importance ratio", match: /^sampling\/importance_sampling_ratio\/(.+)$/, hint: "Trainer's probability ÷ sampler's probability. The mean is close to 1." },
      { title: "Oldest token", fields: { lag_max: "lag_max" }, unit: "versions", hint: "At most trainer.max_lag." },
      { title: "Age of tokens", match: /^staleness\.(.+)$/, label: (age) => `age ${age}`, stacked: true, unit: "tokens by age in versions" },
    ],
  },
  {
    group: "Groups and episodes",
    charts: [
      {
        title: "Groups without use",
        fields: { groups_skipped: "skipped", refilled: "refilled", reasked: "asked again", episodes_failed: "episodes failed" },
        hint: "All completions of a skipped group have the same reward, so nothing is learned from it. If more and more are skipped, read them: the task is solved, too hard, or the reward no longer tells good from bad.",
      },
      { title: "Turns", fields: { turns_mean: "mean" } },
      { title: "Tool calls", fields: { tool_calls: "calls", tool_errors: "errors" } },
      { title: "Time in tools", fields: { environment_s_mean: "mean" }, unit: "seconds per episode" },
    ],
  },
  {
    group: "Speed",
    charts: [
      { title: "Where a step's time goes", match: /^timings\.(.+?)(?:_s)?$/, label: words, stacked: true, unit: "seconds", hint: "Waiting for rollouts and the update are the large ones." },
      { title: "Publishing a version", match: /^publish_timings\.(.+?)(?:_s)?$/, label: words, unit: "seconds", hint: "The parts of it, and the total until all generators serve the version." },
      { title: "Size of a version", fields: { publish_bytes: "size" } },
      { title: "Tokens per second", fields: { tokens_per_s: "tokens per second" }, hint: "Completion tokens, without evaluation and checkpoint." },
      { title: "Tokens by generator", match: /^replica_tokens\.(.+)$/, stacked: true, unit: "tokens per step", hint: "What each replica has sampled since the step before. A replica whose share falls to 0 is gone, or slow." },
      { title: "Load of generators", match: /^replica_outstanding\.(.+)$/, unit: "outstanding tokens", hint: "What each replica may still have to sample at the end of a step. A slow one gets fewer prompts." },
      { title: "Rollout tokens", fields: { rollout_tokens: "tokens" }, unit: "tokens per step" },
    ],
  },
];

// Figures that make no curve, or that a chart above shows in another way. TRL's `reward` is `reward_mean`.
const NOT_SHOWN = /^(step|max_steps|attempt|reward|checkpoint_failures|eval\.(step|attempt|n|eval_reward))$|^rewards_std\.|^alerts\.|^(eval\.eval_)?rewards\/.+\/std$/;

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
  const { fields, match, label = String } = chart;
  for (const name of match ? [...left].filter((name) => match.test(name)) : Object.keys(fields)) {
    if (left.delete(name)) found[name] = match ? label(match.exec(name).slice(1).find(Boolean)) : fields[name];
  }
  return found;
}
