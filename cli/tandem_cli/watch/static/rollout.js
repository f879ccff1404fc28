// One rollout: its rewards, and its conversation turn by turn.

import { block, count, el, figure, visible } from "./text.js";
import { signed, Tokens } from "./tokens.js";

const TURNS = 100;
const STATUS = { finished: "finished", max_tokens: "cut off at the token limit", max_turns: "out of turns", failed: "failed" };

const TITLES = {
  Version: "The weights that sampled the tokens: step.attempt. 224.1 is what step 224 published, in the first start of the run.",
  Advantage: "How much better the reward is than that of the other completions of the prompt. Above 0, the tokens are made more likely.",
};

export function rollout(record) {
  const prompt = record.row === undefined ? "" : ` · prompt ${record.row}`;
  const tokens = new Tokens(record);
  const talk = el("div", {});
  const draw = () => talk.replaceChildren(conversation(record, tokens));
  draw();
  return el("div", {}, el("h2", {}, `Step ${record.step}${prompt}`), facts(record), rewards(record), tokens.toolbar(draw), talk);
}

function facts(record) {
  const versions = Array.isArray(record.versions) ? [...new Set(record.versions)].join(", ") : null;
  const known = {
    Reward: figure(record.reward),
    Advantage: typeof record.advantage === "number" ? signed(record.advantage) : null,
    Status: record.status ? (STATUS[record.status] ?? record.status) : null,
    Reason: record.reason,
    Tokens: record.tokens === undefined ? null : count(record.tokens),
    Turns: record.turns > 1 ? record.turns : null,
    "Tool calls": record.tool_calls || null,
    "Tool errors": record.tool_errors || null,
    Version: versions,
    Learned: record.skipped === true ? "nothing: all completions of the group have the same reward" : null,
  };
  const list = el("dl", { class: "facts" });
  for (const [name, value] of Object.entries(known)) {
    if (value === null || value === undefined) continue;
    list.append(el("div", { title: TITLES[name] ?? "" }, el("dt", {}, name), el("dd", { dir: "auto" }, visible(String(value)))));
  }
  return list;
}

function rewards({ rewards: given }) {
  const entries = Object.entries(given ?? {});
  if (!entries.length) return null;
  const rows = entries.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, visible(name)), el("td", {}, figure(value))));
  const head = el("tr", {}, el("th", { scope: "col" }, "Reward function"), el("th", { scope: "col" }, "Value"));
  return el("table", { class: "rewards" }, el("thead", {}, head), el("tbody", {}, ...rows));
}

function conversation(record, tokens) {
  const messages = Array.isArray(record.messages) && record.messages.length ? record.messages : plain(record);
  const list = el("ol", { class: "turns" });
  const add = (start) => {
    list.append(...messages.slice(start, start + TURNS).map((one, place) => message(one, start + place, tokens)));
    const left = messages.length - start - TURNS;
    if (left <= 0) list.append(...tokens.of(undefined).map((turn) => el("li", { class: "turn assistant" }, el("h3", {}, "sampled"), turn)));
    if (left <= 0) return;
    const more = el("li", {}, el("button", { type: "button" }, `Show more of the other ${count(left)} messages`));
    more.firstChild.addEventListener("click", () => {
      more.remove();
      add(start + TURNS);
    });
    list.append(more);
  };
  add(0);
  return list;
}

/** A run of a TRL script logs no messages. */
const plain = ({ prompt, completion }) => [
  { role: "prompt", content: prompt },
  { role: "completion", content: completion },
];

/** Message number `place`. What the policy sampled of it may be shown as tokens. */
function message(given, place, tokens) {
  const { role, content, name, tool_calls: calls, ...others } = Object(given);
  const title = [role ?? "message", name].filter(Boolean).map(String).map(visible).join(" · ");
  const item = el("li", { class: `turn ${kindOf(role)}` }, el("h3", {}, title));
  const { tool_call_id: id, ...unknown } = others;
  if (id) item.firstChild.append(el("span", { class: "muted" }, ` answers ${visible(String(id))}`));
  const turns = tokens.of(place);
  const text = turns.length ? tokens.rest(place, textOf(content)) : textOf(content);
  item.append(...turns);
  if (text || !(calls || turns.length)) item.append(text ? block(text) : el("p", { class: "muted" }, "(empty)"));
  for (const call of Array.isArray(calls) ? calls : []) item.append(toolCall(call));
  for (const [field, value] of Object.entries(unknown)) {
    if (value !== null) item.append(el("h4", {}, visible(field)), block(textOf(value), "text code"));
  }
  return item;
}

const kindOf = (role) => (["system", "user", "assistant", "tool", "prompt", "completion"].includes(role) ? role : "other");

function toolCall(call) {
  const { name, arguments: given } = call?.function ?? Object(call);
  const id = call?.id ? el("span", { class: "muted" }, ` ${visible(String(call.id))}`) : null;
  return el("div", { class: "call" }, el("h4", {}, `calls ${visible(String(name ?? "?"))}`, id), block(pretty(given), "text code"));
}

/** Arguments with one per line. A model may write some that are no JSON; they are shown as they are. */
function pretty(given) {
  if (typeof given !== "string") return textOf(given);
  try {
    return JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    return given;
  }
}

function textOf(content) {
  if (content === null || content === undefined) return "";
  if (typeof content === "string") return content;
  const parts = Array.isArray(content) ? content.map((part) => part?.text) : [];
  if (parts.length && parts.every((part) => typeof part === "string")) return parts.join("\n");
  return JSON.stringify(content, null, 2);
}
