// Events of all runs, the newest first. Each has a level: an icon with a word, so that the colour is not needed.

import { color } from "./chart.js";
import { levelOf, runs, words } from "./data.js";
import { count, el, visible } from "./text.js";

const ICONS = { error: "✕", warning: "▲", info: "●" };
const LEVELS = { "": "all", attention: "warnings and errors", error: "errors", warning: "warnings", info: "information" };
const SHOWN = 500;

export class Events {
  constructor(main, go, parameters) {
    this.go = go;
    this.kind = "";
    this.level = Object.hasOwn(LEVELS, parameters?.get("level")) ? parameters.get("level") : "";
    this.kinds = el("select", { id: "kind", onchange: () => this.choose({ kind: this.kinds.value }) });
    const levels = el("select", { id: "level", onchange: () => this.choose({ level: levels.value }) });
    levels.append(...Object.entries(LEVELS).map(([value, text]) => el("option", { value, selected: value === this.level }, text)));
    this.list = el("ol", { class: "timeline" });
    main.replaceChildren(
      el("h1", { class: "hidden" }, "Events"),
      el("div", { class: "toolbar" }, el("label", { htmlFor: "level" }, "Level ", levels), el("label", { htmlFor: "kind" }, "Kind ", this.kinds)),
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
    const shown = events.filter((event) => this.isShown(event)).sort((a, b) => b.step - a.step);
    const empty = el("li", { class: "empty" }, events.length ? "No event is of this kind and level." : "Nothing has happened besides steps.");
    const more = el("li", { class: "empty" }, `… and ${count(shown.length - SHOWN)} earlier ones.`);
    this.list.replaceChildren(...shown.slice(0, SHOWN).map((event) => this.item(event)), ...(shown.length > SHOWN ? [more] : []));
    if (!shown.length) this.list.append(empty);
  }

  isShown(event) {
    const level = levelOf(event);
    const isOfLevel = !this.level || level === this.level || (this.level === "attention" && level !== "info");
    return isOfLevel && (!this.kind || String(event.kind) === this.kind);
  }

  choose(changes) {
    Object.assign(this, changes);
    this.update();
  }

  item(event) {
    const { step, kind, message, time_unix_s: time, page, run } = event;
    const level = levelOf(event);
    const parameters = new URLSearchParams({ run: run.number, step, ...(kind === "evaluation" && { from: "evaluation" }) });
    const date = new Date(time * 1000);
    const isKnown = time && !Number.isNaN(date.getTime());
    const when = isKnown ? el("time", { dateTime: date.toISOString() }, date.toLocaleString()) : null;
    const name = runs.length > 1 ? el("bdi", { class: "run-name" }, run.state.name) : null;
    if (name) name.style.color = color(run.number);
    const icon = el("i", { class: "icon", "aria-hidden": "true" }, ICONS[level]);
    const said = level === "info" ? null : el("b", {}, level);
    return el(
      "li",
      { class: level },
      el("p", { class: "when" }, icon, said, el("a", { href: `#rollouts?${parameters}` }, `step ${step}`), el("span", { class: "badge" }, words(String(kind))), name, when),
      el("p", { class: "message", dir: "auto" }, visible(String(message ?? ""))),
      explanation(page),
    );
  }
}

/** Where the documentation explains an alert: a page and a heading, such as `alerts.html#entropy-collapse`. */
function explanation(page) {
  const found = /^([\w/-]+)\.(?:html|md)(?:#([\w-]+))?$/.exec(page ?? "");
  if (!found) return null;
  const [, file, heading] = found;
  const path = `docs/train/${file.replace(/^docs\/train\//, "")}.md`;
  return el("p", { class: "hint" }, "What to do: ", el("code", {}, path), heading ? `, “${words(heading.replaceAll("-", "_"))}”` : "");
}
