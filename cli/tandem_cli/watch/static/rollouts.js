// Rollouts: a step's trajectories on the left, the chosen one on the right. Filters search the step, or all steps.

import { ask, runs } from "./data.js";
import { highlight } from "./highlight.js";
import { List } from "./list.js";
import { rollout } from "./rollout.js";
import { count, el, many } from "./text.js";

const STATUSES = { "": "any status", finished: "finished", max_tokens: "cut off", max_turns: "out of turns", failed: "failed" };
const ENOUGH = 50;
const WIDE = window.matchMedia("(min-width: 60.01rem)");
const NOTHING = { rows: [], next: null };

export class Rollouts {
  constructor(main, go, parameters) {
    this.go = go;
    this.run = runs[Number(parameters.get("run") ?? 0)] ?? runs[0];
    this.found = NOTHING;
    this.query = null;
    this.at = -1;
    this.list = new List((row) => this.open(row), (direction) => this.turn(direction));
    this.detail = el("section", { class: "detail", "aria-label": "Rollout", "aria-live": "polite", tabIndex: -1 });
    this.note = el("p", { class: "note", hidden: parameters.get("from") !== "evaluation" }, "Completions of evaluations are not logged. These are the training rollouts of the step.");
    this.message = el("p", { class: "hint", role: "status" });
    this.more = el("button", { type: "button", hidden: true, onclick: () => this.goOn() });
    main.replaceChildren(
      el("h1", { class: "hidden" }, "Rollouts"),
      this.steps(),
      this.filters(),
      el("div", { class: "panes" }, el("div", { class: "pane" }, this.note, this.message, this.list.element, this.more), this.detail),
    );
    const step = Number(parameters.get("step") ?? NaN);
    this.show(Number.isInteger(step) ? step : this.span.last, Number(parameters.get("at") ?? -1));
  }

  close() {
    this.closed = true;
  }

  get span() {
    return this.run.state.rollouts;
  }

  steps() {
    const button = (text, onclick, label) => el("button", { type: "button", onclick, "aria-label": label ?? text }, text);
    const choice = el("select", { "aria-label": "Run", onchange: () => this.switch(runs[choice.value]) });
    choice.append(...runs.map((run) => el("option", { value: run.number, selected: run === this.run }, run.state.name)));
    const chosen = () => this.show(this.input.value === "" ? this.step : Number(this.input.value));
    this.input = el("input", { type: "number", id: "step", min: 0, onchange: chosen });
    this.earlier = button("◀", () => this.turn(-1), "Earlier step");
    this.later = button("▶", () => this.turn(1), "Later step");
    this.range = el("span", { class: "muted" });
    return el(
      "div",
      { class: "toolbar", role: "group", "aria-label": "Step" },
      runs.length > 1 ? choice : null,
      el("span", { class: "joined" }, this.earlier, el("label", { htmlFor: "step" }, "Step ", this.input), this.later),
      this.range,
      button("Newest", () => this.show(this.span.last)),
      el("span", { class: "space" }),
      button("Best", () => this.extreme(1), "Best: open the rollout with the highest reward"),
      button("Worst", () => this.extreme(-1), "Worst: open the rollout with the lowest reward"),
      this.list.order,
    );
  }

  filters() {
    const field = (id, text, properties) => el("label", { htmlFor: id }, text, el("input", { id, ...properties }));
    const status = el("select", { id: "status", "aria-label": "Status" });
    status.append(...Object.entries(STATUSES).map(([value, text]) => el("option", { value }, text)));
    const scope = el("select", { id: "scope", "aria-label": "Where to search" });
    scope.append(el("option", { value: "step" }, "in this step"), el("option", { value: "all" }, "in all steps"));
    this.form = el(
      "form",
      { class: "toolbar filters", role: "search" },
      el("input", { id: "text", type: "search", placeholder: "Text in the conversation", "aria-label": "Text in the conversation" }),
      status,
      field("min", "Reward from ", { type: "number", step: "any" }),
      field("max", "to ", { type: "number", step: "any" }),
      field("errors", "Tool errors ", { type: "checkbox" }),
      scope,
      el("button", { type: "submit" }, "Filter"),
      el("button", { type: "button", onclick: () => this.clear() }, "Clear"),
    );
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.search();
    });
    return this.form;
  }

  /** Follow the run: new steps, and new trajectories of the step on the screen. */
  update() {
    if (this.step === undefined && this.span.last !== null) return this.show(this.span.last);
    const grew = this.span.size_bytes !== this.size;
    this.showRange();
    if (grew && this.step !== undefined && !this.query && (this.found.later ?? null) === null) this.show(this.step, this.at, true);
  }

  showRange() {
    this.size = this.span.size_bytes;
    const { first, last } = this.span;
    this.range.textContent = first === null ? "" : `of ${count(first)} to ${count(last)}`;
    this.earlier.disabled = first === null || !(this.step > first);
    this.later.disabled = last === null || !(this.step < last);
  }

  switch(run) {
    this.run = run;
    this.found = NOTHING;
    this.list.show([], -1, false);
    this.closeDetail(); // another run may have a rollout at the same offset
    this.show(this.span.last);
  }

  turn(direction) {
    const next = direction < 0 ? this.found.earlier : (this.found.later ?? this.span.last);
    if (next !== null && next !== undefined && next !== this.step) this.show(next);
  }

  /** Show the trajectories of a step, and open the one at the offset `at`. `quietly`: as many as before, or more. */
  async show(step, at = -1, quietly = false) {
    if (this.step !== undefined && step !== this.step) this.note.hidden = true;
    this.step = step ?? undefined;
    this.input.placeholder = "";
    this.input.value = step ?? "";
    this.query = null;
    highlight(this.detail, ".text", "");
    this.more.hidden = true;
    this.showRange();
    const ticket = (this.ticket = {});
    if (this.step === undefined) return this.showNothing();
    try {
      const found = await this.read(step, quietly ? this.found.rows.length : 1);
      if (ticket !== this.ticket || this.closed) return;
      this.found = found;
    } catch (error) {
      if (ticket === this.ticket) this.message.textContent = error.message;
      return;
    }
    if (quietly) return this.showStep(at);
    const chosen = this.found.rows.find((row) => row.at === at) ?? (WIDE.matches ? this.best(1) : undefined);
    this.showStep(chosen?.at ?? -1);
    if (chosen) this.open(chosen);
    else this.closeDetail();
  }

  /** Ask for the trajectories of a step, in parts, until there are `enough`. `found` has those that are known. */
  async read(step, enough, found = NOTHING) {
    do {
      const part = await ask(`/${this.run.number}/steps/${step}/rollouts`, { after: found.next });
      found = { ...part, rows: [...found.rows, ...part.rows] };
    } while (found.next !== null && found.rows.length < enough);
    return found;
  }

  showNothing() {
    this.found = NOTHING;
    this.list.show([], -1, false);
    this.message.textContent = "No rollouts are logged yet. They appear here after the first step.";
    this.closeDetail();
  }

  showStep(at) {
    const { rows, next, earlier, later } = this.found;
    const step = this.step;
    this.message.textContent = rows.length
      ? `${next ? "The first " : ""}${many(rows.length, "logged rollout")} of step ${count(step)}`
      : `No rollouts of step ${count(step)} are logged. ${nearest(earlier, later)}`;
    this.list.show(rows, at, false);
    this.offerMore("Show more");
  }

  offerMore(text) {
    this.more.textContent = text;
    this.more.hidden = this.found.next === null;
  }

  /** Show more of the step or of the search. */
  async goOn() {
    if (this.query) return this.search(this.found.next);
    const ticket = (this.ticket = {});
    try {
      const found = await this.read(this.step, 0, this.found);
      if (ticket !== this.ticket || this.closed) return;
      this.found = found;
      this.showStep(this.at);
    } catch (error) {
      if (ticket === this.ticket) this.message.textContent = error.message;
    }
  }

  /** Show what the filters find, at first from the beginning, then behind `after`. */
  async search(after = null) {
    const value = (id) => this.form.querySelector(`#${id}`).value.trim();
    const inStep = value("scope") === "step";
    const query = {
      text: value("text"),
      status: value("status"),
      min_reward: value("min"),
      max_reward: value("max"),
      tool_errors: this.form.querySelector("#errors").checked || "",
    };
    if (this.step === undefined || !Object.values(query).some(Boolean)) return this.show(this.step);
    this.query = query;
    this.note.hidden = true;
    this.input.value = inStep ? this.step : "";
    this.input.placeholder = inStep ? "" : "all";
    if (after === null) this.closeDetail();
    const ticket = (this.ticket = {});
    const rows = after === null ? [] : this.found.rows;
    const enough = rows.length + ENOUGH;
    this.more.hidden = true;
    let next = after;
    try {
      do {
        const range = inStep ? { from_step: this.step, to_step: this.step } : {};
        const answer = await ask(`/${this.run.number}/search`, { ...query, ...range, after: next });
        if (ticket !== this.ticket || this.closed) return;
        rows.push(...answer.rows);
        next = answer.next;
        const shown = rows.length ? `First ${count(rows.length)} shown` : "Nothing found yet";
        this.message.textContent = `${shown}, ${percent(answer.read)} searched so far`;
        this.found = { ...this.found, rows, next };
        if (this.at < 0 && rows.length && WIDE.matches) this.open(rows[0]);
        this.list.show(rows, this.at, !inStep);
      } while (next !== null && rows.length < enough);
    } catch (error) {
      if (ticket === this.ticket) this.message.textContent = error.message;
      return;
    }
    if (next === null) this.message.textContent = `${count(rows.length)} found ${inStep ? `in step ${count(this.step)}` : "in all steps"}`;
    this.offerMore("Show more");
  }

  clear() {
    this.form.reset();
    this.show(this.step);
  }

  /** Open the rollout with the highest (1) or lowest (-1) reward of those on the list. */
  extreme(direction) {
    const found = this.best(direction);
    if (found) this.list.choose(found);
  }

  best(direction) {
    const scored = this.found.rows.filter(({ reward }) => reward !== undefined);
    return scored.length ? scored.reduce((one, other) => (direction * (other.reward - one.reward) > 0 ? other : one)) : undefined;
  }

  async open(row) {
    if (row.at === this.at && this.opening === null) return this.reveal(); // it is on the screen
    this.at = row.at;
    const step = row.step ?? this.step;
    this.go("rollouts", { run: this.run.number, step, at: row.at }, true);
    const ticket = (this.opening = {});
    try {
      const record = row.damaged ? null : await ask(`/${this.run.number}/rollouts/${row.at}`);
      if (ticket !== this.opening || this.closed) return;
      this.detail.replaceChildren(record ? rollout(record) : el("p", {}, row.damaged));
      this.opening = null;
      highlight(this.detail, ".turns .text", this.query?.text ?? "");
    } catch (error) {
      if (ticket !== this.opening) return;
      this.detail.replaceChildren(el("p", { class: "notice" }, error.message));
    }
    this.reveal();
  }

  /** In a narrow window, the rollout is below the list. */
  reveal() {
    if (!WIDE.matches) this.detail.scrollIntoView();
  }

  closeDetail() {
    this.at = -1;
    this.opening = {}; // an answer that comes later is not shown
    this.go("rollouts", { run: this.run.number, ...(this.step !== undefined && { step: this.step }) }, true);
    this.detail.replaceChildren(el("p", { class: "empty" }, "Choose a rollout. While the list has the focus, ↑ and ↓ go through it, ← and → to other steps."));
  }
}

/** A share of the file that is above 0 is never called 0. */
const percent = (share) => (share < 0.01 ? "less than 1 %" : `${Math.round(100 * share)} %`) + " of the file";

function nearest(earlier, later) {
  const known = [earlier, later].filter((step) => step !== null && step !== undefined).map(count);
  return known.length ? `The nearest are of step ${known.join(" and ")}.` : "";
}
