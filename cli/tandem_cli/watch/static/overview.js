// The overview: the newest figures of each run, and the curves of all of them.

import { Chart } from "./chart.js";
import { best, last, namesOf, runs } from "./data.js";
import { chartsOf } from "./figures.js";
import { amount, count, el, figure } from "./text.js";

const TILES = {
  reward_mean: "Reward",
  "eval.reward_mean": "Evaluation",
  kl_sampler: "KL of sampler",
  entropy: "Entropy",
  completion_tokens_mean: "Completion length",
  truncated_fraction: "Truncated",
  groups_skipped: "Groups skipped",
  tokens_per_s: "Tokens per second",
};

const HAS_BEST = new Set(["reward_mean", "eval.reward_mean"]);
const OF = { completion_tokens_mean: "tokens, newest step", truncated_fraction: "of completions, newest step", groups_skipped: "groups, newest step" };

export class Overview {
  constructor(main, go) {
    this.go = go;
    this.options = { smoothing: 0 };
    this.tiles = el("div", { class: "summary" });
    this.charts = el("div", { class: "charts" });
    const choice = el("select", { id: "smoothing", onchange: () => this.smooth(Number(choice.value)) });
    choice.append(...Object.entries({ 0: "none", 0.8: "light", 0.95: "strong" }).map(([value, text]) => el("option", { value }, text)));
    const hint = el("p", { class: "hint" }, "Click a curve to read the training rollouts of its step. Drag to zoom, double-click to zoom out.");
    main.replaceChildren(
      el("h1", { class: "hidden" }, "Overview"),
      this.tiles,
      el("div", { class: "toolbar" }, hint, el("label", { htmlFor: "smoothing" }, "Smoothing ", choice)),
      this.charts,
    );
    this.cards = [];
    this.observer = new IntersectionObserver((entries) => this.seen(entries), { rootMargin: "200px" });
    this.scheme = window.matchMedia("(prefers-color-scheme: dark)");
    this.redraw = () => this.cards.forEach((card) => card.update());
    this.scheme.addEventListener("change", this.redraw);
    this.update();
  }

  close() {
    this.observer.disconnect();
    this.cards.forEach((card) => card.close());
    this.scheme.removeEventListener("change", this.redraw);
  }

  update() {
    this.tiles.replaceChildren(...runs.map((run) => tiles(run)));
    const names = [...new Set(runs.flatMap(namesOf))];
    if (names.join() !== this.names) this.build(names);
    this.redraw();
  }

  build(names) {
    this.names = names.join();
    this.observer.disconnect();
    this.cards.forEach((card) => card.close());
    this.cards = [];
    const sections = chartsOf(names).map(({ group, charts }) => {
      const cards = charts.map((chart) => new Chart(chart, this.options, (run, step, names) => this.open(run, step, names)));
      this.cards.push(...cards);
      return el("section", {}, el("h2", {}, group), el("div", { class: "grid" }, ...cards.map(({ card }) => card)));
    });
    const empty = el("p", { class: "empty" }, "No step is finished yet. The curves appear here after the first one.");
    this.charts.replaceChildren(...(sections.length ? sections : [empty]));
    this.cards.forEach(({ card }) => this.observer.observe(card));
  }

  /** Open the rollouts of a step. They say so if the reader has asked for those of an evaluation. */
  open(run, step, names) {
    this.go("rollouts", { run, step, ...(names.some((name) => name.startsWith("eval.")) && { from: "evaluation" }) });
  }

  seen(entries) {
    for (const { target, isIntersecting } of entries) {
      const card = this.cards.find((one) => one.card === target);
      if (!card) continue;
      const appeared = isIntersecting && !card.isVisible;
      card.isVisible = isIntersecting;
      if (appeared) card.update();
    }
  }

  smooth(weight) {
    this.options.smoothing = weight;
    this.redraw();
  }
}

function tiles(run) {
  const shown = Object.entries(TILES).filter(([name]) => last(run, name) !== null);
  const list = el("dl", { class: "tiles" });
  list.append(...shown.map(([name, title]) => el("div", {}, el("dt", {}, title), el("dd", {}, amount(name, last(run, name))), note(run, name))));
  const name = runs.length > 1 ? el("h2", {}, el("bdi", {}, run.state.name)) : null;
  return el("section", { "aria-label": `Newest figures of ${run.state.name}` }, name, list);
}

/** Below a figure: the best one so far, or what it counts. */
function note(run, name) {
  const top = HAS_BEST.has(name) ? best(run, name) : null;
  const text = top ? `best ${figure(Number(top.value.toPrecision(3)))} ${top.isExact ? "at" : "near"} step ${count(top.step)}` : OF[name];
  return text ? el("dd", { class: "note" }, text) : null;
}
