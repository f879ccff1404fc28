// The sampled tokens of a rollout, coloured by what trainer and sampler say about them, with the numbers of each token.

import { count, el, figure, visible } from "./text.js";

const FOLDED = 2000;
const PER_FRAME = 1000;
const PART = 500;
const KINDS = { none: "nothing", gap: "logprob gap", advantage: "advantage", version: "version" };
const GAPS = [0.02, 0.1, 0.5];
const ADVANTAGES = [0.001, 0.5, 1.5];
const VERSION_COLORS = 8;
let chosen = null; // kept while the reader goes from one rollout to the next

/** The tokens of a record, and the choice of their colours. Records of earlier releases have none. */
export class Tokens {
  constructor(record) {
    this.record = record;
    this.spans = (Array.isArray(record.spans) ? record.spans : []).map(span).filter(Boolean);
    this.hasGap = this.spans.some(({ trainer }) => trainer.length);
    this.versions = [...new Set(this.spans.flatMap(({ versions }) => versions.map(([version]) => version)))];
    this.kinds = Object.keys(KINDS).filter((kind) => ({ gap: this.hasGap, advantage: record.advantage !== undefined })[kind] ?? true);
    this.kind = this.kinds.includes(chosen) ? chosen : "none";
    this.readout = el("p", { class: "readout", role: "status" });
  }

  /** The turns of a message as tokens; none if tokens are not coloured. `undefined`: the turns that are no message. */
  of(message) {
    if (this.kind === "none") return [];
    return this.spans.filter((one) => one.message === message).map((one) => this.block(one));
  }

  /** The end of a message's text, of which only the first tokens are logged. */
  rest(message, text) {
    const logged = this.spans.filter((one) => one.message === message).flatMap((one) => one.text).join("");
    return text.startsWith(logged) ? text.slice(logged.length) : "";
  }

  /** What chooses the colours, and says what they mean. `draw` is called after each choice. */
  toolbar(draw) {
    if (!this.spans.length) return null;
    const legend = el("div", {});
    const show = () => {
      const hint = "Point at a token for its numbers. While the text has the focus, ← and → go from token to token.";
      this.readout.textContent = hint;
      this.readout.hidden = this.kind === "none";
      legend.replaceChildren(...[this.legend(), this.note()].filter(Boolean));
    };
    const choice = el("select", {
      id: "color",
      onchange: () => {
        this.kind = chosen = choice.value;
        show();
        draw();
      },
    });
    choice.append(...this.kinds.map((kind) => el("option", { value: kind, selected: kind === this.kind }, KINDS[kind])));
    show();
    return el("div", { class: "coloring" }, el("label", { htmlFor: "color" }, "Colour tokens by ", choice), legend, this.readout);
  }

  legend() {
    const of = (entries) => el("ul", { class: "legend" }, ...entries.map(([name, text]) => el("li", {}, el("i", { class: `sample ${name}` }, "ab"), text)));
    if (this.kind === "gap") return of(scale(GAPS, `less likely for the trainer by ${GAPS[0]} nats`, `more likely by ${GAPS[0]} nats`, "alike"));
    if (this.kind === "advantage") return of(scale(ADVANTAGES, "made less likely", "made more likely", "no advantage"));
    if (this.kind !== "version") return null;
    return of(this.versions.map((version, number) => [`version${number % VERSION_COLORS}`, visible(`version ${version}`)]));
  }

  note() {
    const logged = this.spans.reduce((sum, { text }) => sum + text.length, 0);
    const notes = [
      this.hasGap ? "" : "The step computed no trainer logprobs of it: nothing was learned from it.",
      this.record.tokens > logged ? `Only the first ${count(logged)} of ${count(this.record.tokens)} tokens are in the file (trainer.log_tokens).` : "",
    ];
    return notes.some(Boolean) ? el("p", { class: "hint" }, notes.filter(Boolean).join(" ")) : null;
  }

  block(one) {
    const shown = el("div", { class: "text tokens", dir: "auto", tabIndex: 0, role: "group", "aria-label": `${count(one.text.length)} tokens` });
    const tokens = [];
    let now = -1;
    const add = (end) => {
      while (tokens.length < end) {
        const part = el("div", {}); // the browser lays out each part by itself, so more parts take no longer
        for (const stop = endOfPart(one.text, tokens.length, end); tokens.length < stop; ) {
          tokens.push(this.token(one, tokens.length));
          part.append(tokens.at(-1));
        }
        shown.append(part);
      }
    };
    add(Math.min(FOLDED, one.text.length));
    const point = (index) => {
      tokens[now]?.classList.remove("now");
      now = index;
      tokens[now].classList.add("now");
      tokens[now].title = this.readout.textContent = this.describe(one, index);
    };
    shown.addEventListener("mouseover", ({ target }) => target.index !== undefined && point(target.index));
    shown.addEventListener("keydown", (event) => {
      const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (!tokens[next]) return;
      event.preventDefault();
      point(next);
      tokens[next].scrollIntoView({ block: "nearest" });
    });
    if (one.text.length <= FOLDED) return shown;
    const unfold = el("button", { type: "button", class: "unfold" }, `Show all ${count(one.text.length)} tokens`);
    unfold.addEventListener("click", async () => {
      unfold.remove();
      shown.focus();
      while (tokens.length < one.text.length && shown.isConnected) {
        add(Math.min(tokens.length + PER_FRAME, one.text.length));
        await new Promise(requestAnimationFrame); // so that the page answers in between
      }
    });
    return el("div", {}, shown, unfold);
  }

  token(one, index) {
    const text = one.text[index];
    const shown = el("span", { class: this.colorOf(one, index) }, text === "" ? "·" : visible(text).replaceAll("\n", "↵\n"));
    if (text === "") shown.classList.add("part");
    shown.index = index;
    return shown;
  }

  colorOf(one, index) {
    if (this.kind === "gap") return tone(gap(one, index), GAPS);
    if (this.kind === "advantage") return tone(this.record.advantage, ADVANTAGES);
    return `version${this.versions.indexOf(one.version[index]) % VERSION_COLORS}`;
  }

  describe(one, index) {
    const { text, sampler, trainer, version } = one;
    const between = gap(one, index);
    const parts = [
      `token ${count(index + 1)} of ${count(text.length)}`,
      text[index] === "" ? "a part of the next character" : visible(JSON.stringify(text[index])),
      sampler[index] === undefined ? "" : `sampler ${exact(sampler[index])} nats (${percent(sampler[index])})`,
      trainer[index] === undefined ? "no trainer logprob" : `trainer ${exact(trainer[index])} nats (${percent(trainer[index])})`,
      between === undefined ? "" : `gap ${signed(between)}`,
      typeof this.record.advantage === "number" ? `advantage ${signed(this.record.advantage)}` : "",
      version[index] === undefined ? "" : `version ${visible(version[index])}`,
    ];
    return parts.filter(Boolean).join(" · ");
  }
}

/** A span of a record, with a version for each token. Null if it is damaged. */
function span(given) {
  if (!Array.isArray(given?.text) || !given.text.every((text) => typeof text === "string")) return null;
  const numbers = (values) => (Array.isArray(values) ? values.map((value) => (typeof value === "number" ? value : undefined)) : []);
  const versions = (Array.isArray(given.versions) ? given.versions : []).filter((one) => Array.isArray(one) && Number.isInteger(one[1]));
  const left = { tokens: given.text.length };
  const version = versions.flatMap(([name, tokens]) => {
    const size = Math.max(0, Math.min(tokens, left.tokens));
    left.tokens -= size;
    return Array(size).fill(String(name));
  });
  return {
    message: given.message ?? undefined,
    text: given.text,
    sampler: numbers(given.sampler),
    trainer: numbers(given.trainer),
    versions: versions.map(([name, tokens]) => [String(name), tokens]),
    version,
  };
}

/** Where a part of a long text ends: behind a line break, or after PART tokens. */
function endOfPart(text, start, end) {
  const latest = Math.min(start + PART, end);
  const found = text.slice(start + PART / 2, latest).findIndex((token) => token.includes("\n"));
  return found < 0 ? latest : start + PART / 2 + found + 1;
}

/** How much more likely the trainer finds a token than the sampler did, in nats. */
const gap = ({ sampler, trainer }, index) =>
  trainer[index] === undefined || sampler[index] === undefined ? undefined : trainer[index] - sampler[index];

/** The class of a colour: blue above 0, orange below, stronger with the size. */
function tone(value, bounds) {
  if (typeof value !== "number") return "unknown";
  const strength = bounds.filter((bound) => Math.abs(value) >= bound).length;
  return strength ? `${value > 0 ? "up" : "down"}${strength}` : "same";
}

/** Classes of colours and what they mean. The weakest says what its side is, the others from where on they begin. */
function scale(bounds, down, up, same) {
  const entry = (sign, name) => bounds.map((bound, level) => [`${sign}${level + 1}`, level ? String(bound) : name]);
  return [...entry("down", down).reverse(), ["same", same], ...entry("up", up)];
}

const exact = (value) => value.toFixed(4).replace("-", "−");
const percent = (logprob) => `${figure(100 * Math.exp(logprob))} %`;
export const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${figure(Math.abs(Number(value.toFixed(4))))}`;
