// Events of all runs, the newest first.

import { color } from "./chart.js";
import { runs } from "./data.js";
import { count, el, visible } from "./text.js";

const CALM = new Set(["finished", "evaluation", "checkpoint", "settings_changed", "resumed"]);
const SHOWN = 500;

export class Events {
  constructor(main, go) {
    this.go = go;
    this.kind = "";
    this.kinds = el("select", { id: "kind", onchange: () => this.choose(this.kinds.value) });
    this.list = el("ol", { class: "timeline" });
    main.replaceChildren(
      el("h1", { class: "hidden" }, "Events"),
      el("div", { class: "toolbar" }, el("label", { htmlFor: "kind" }, "Kind ", this.kinds)),
      this.list,
    );
    this.update();
  }

  close() {}

  update() {
    const events = runs.flatMap((run) => run.events.map((event) => ({ ...event, run })));
    const kinds = ["", ...new Set(events.map(({ kind }) => String(kind)))].sort();
    if (kinds.join() !== this.known) {
      this.known = kinds.join();
      this.kinds.replaceChildren(...kinds.map((kind) => el("option", { value: kind }, kind ? words(kind) : "all")));
      this.kinds.value = this.kind;
    }
    const shown = events.filter(({ kind }) => !this.kind || String(kind) === this.kind).sort((a, b) => b.step - a.step);
    const empty = el("li", { class: "empty" }, "Nothing has happened besides steps.");
    const more = el("li", { class: "empty" }, `… and ${count(shown.length - SHOWN)} earlier ones.`);
    this.list.replaceChildren(...shown.slice(0, SHOWN).map((event) => this.item(event)), ...(shown.length > SHOWN ? [more] : []));
    if (!shown.length) this.list.append(empty);
  }

  choose(kind) {
    this.kind = kind;
    this.update();
  }

  item({ step, kind, message, time_unix_s: time, run }) {
    const parameters = new URLSearchParams({ run: run.number, step });
    const date = new Date(time * 1000);
    const isKnown = time && !Number.isNaN(date.getTime());
    const when = isKnown ? el("time", { dateTime: date.toISOString() }, date.toLocaleString()) : null;
    const name = runs.length > 1 ? el("bdi", { class: "run-name" }, run.state.name) : null;
    if (name) name.style.color = color(run.number);
    return el(
      "li",
      { class: CALM.has(kind) ? "calm" : "alert" },
      el("p", { class: "when" }, el("a", { href: `#rollouts?${parameters}` }, `step ${step}`), el("span", { class: "badge" }, words(String(kind))), name, when),
      el("p", { class: "message", dir: "auto" }, visible(String(message ?? ""))),
    );
  }
}

const words = (kind) => visible(kind.replaceAll("_", " "));
