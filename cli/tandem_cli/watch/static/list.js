// The list of rollouts: by prompt, or in the order of their rewards. Arrow keys go through it.

import { el, figure, line, many } from "./text.js";
import { signed } from "./tokens.js";

const ORDERS = { prompt: "by prompt", high: "highest reward first", low: "lowest reward first" };
const SHORT = 120; // characters; a longer completion is shown as its start and its end
const END = 80;
const WORDS = { max_tokens: "cut off", max_turns: "out of turns" };

export class List {
  constructor(open, turn) {
    this.open = open;
    this.rows = [];
    this.element = el("div", { class: "list", role: "group", "aria-label": "Rollouts" });
    this.element.addEventListener("keydown", (event) => this.key(event, turn));
    this.order = el("select", { "aria-label": "Order", onchange: () => this.render() });
    this.order.append(...Object.entries(ORDERS).map(([value, text]) => el("option", { value }, text)));
  }

  /** Show rows. `hasSteps`: they are of several steps. */
  show(rows, at, hasSteps) {
    Object.assign(this, { rows, at, hasSteps });
    this.render();
  }

  render() {
    const focused = this.element.contains(document.activeElement);
    const rewards = this.rows.map(({ reward }) => reward).filter((reward) => reward !== undefined);
    const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
    this.buttons = new Map();
    const items = this.sorted().flatMap(({ head, rows }) => [head, ...rows.map((row) => this.button(row, low, high))]);
    this.element.replaceChildren(...items.filter(Boolean));
    this.mark(this.at);
    if (focused) this.buttons.get(this.at)?.focus();
  }

  sorted() {
    if (this.order.value !== "prompt") {
      const sign = this.order.value === "high" ? -1 : 1;
      const known = this.rows.filter(({ reward }) => reward !== undefined);
      const unknown = this.rows.filter(({ reward }) => reward === undefined);
      return [{ head: null, rows: [...known.sort((a, b) => sign * (a.reward - b.reward)), ...unknown] }];
    }
    const groups = new Map();
    for (const row of this.rows) {
      const key = `${row.step} ${row.row ?? row.prompt}`;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(row);
    }
    return [...groups.values()].map((rows) => ({ head: this.head(rows[0]), rows }));
  }

  head({ step, row, prompt, skipped }) {
    const name = [this.hasSteps ? `step ${step}` : "", row === undefined ? "" : `prompt ${row}`].filter(Boolean).join(" · ");
    const badge = skipped ? el("span", { class: "badge", title: "All completions of the group have the same reward" }, "skipped") : null;
    return el("h3", {}, el("span", {}, name, badge), line(prompt ?? ""));
  }

  button(row, low, high) {
    const title = "Reward. The bar compares it with the others of this list: empty is the lowest, full the highest.";
    const reward = el("span", { class: "reward", title }, row.reward === undefined ? "–" : figure(Number(row.reward.toPrecision(3))));
    if (row.reward !== undefined && high > low) reward.style.setProperty("--share", `${Math.round((100 * (row.reward - low)) / (high - low))}%`);
    const facts = [
      row.advantage === undefined ? "" : `advantage ${signed(row.advantage)}`,
      row.tokens === undefined ? "" : many(row.tokens, "token"),
      row.turns > 1 ? many(row.turns, "turn") : "",
      row.tool_calls ? many(row.tool_calls, "tool call") : "",
      row.tool_errors ? many(row.tool_errors, "tool error") : "",
      this.order.value !== "prompt" && this.hasSteps ? `step ${row.step}` : "",
    ];
    const badge = row.status && row.status !== "finished" ? el("span", { class: "badge" }, WORDS[row.status] ?? row.status) : null;
    const button = el("button", { type: "button", class: "row", onclick: () => this.choose(row) }, reward, preview(row));
    button.append(el("span", { class: "facts" }, badge, facts.filter(Boolean).join(" · ")));
    this.buttons.set(row.at, button);
    return button;
  }

  choose(row) {
    this.at = row.at;
    this.mark(row.at);
    this.buttons.get(row.at)?.focus();
    this.open(row);
  }

  mark(at) {
    for (const [place, button] of this.buttons) button.ariaCurrent = place === at ? "true" : null;
  }

  key(event, turn) {
    const buttons = [...this.buttons.values()];
    const now = buttons.indexOf(document.activeElement);
    const target = { ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (target !== undefined && buttons[target]) buttons[target].click();
    else if (event.key === "ArrowLeft") turn(-1);
    else if (event.key === "ArrowRight") turn(1);
    else if (target === undefined) return;
    event.preventDefault();
  }
}

/** The start of a completion and, below it, its end: completions to one prompt often begin alike. */
function preview({ damaged, completion, completion_end: end }) {
  if (damaged || !completion) return el("span", { class: "snippet" }, damaged ?? "(empty)");
  if (completion.length <= SHORT) return el("span", { class: "snippet whole" }, line(completion));
  const last = [...(end || completion)].slice(-END).join("").replace(/^\S{1,12}\s+/, "");
  return el("span", { class: "preview" }, el("span", { class: "snippet" }, line(completion)), el("span", { class: "ending" }, "… ", line(last)));
}
