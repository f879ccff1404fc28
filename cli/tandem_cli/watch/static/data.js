// What the server has said so far about each run. Only what is new is asked for.

import { visible } from "./text.js";

const CALM = new Set(["finished", "evaluation", "checkpoint", "settings_changed", "resumed"]);

export const runs = [];

/** The level of an event: `info`, `warning` or `error`. Those of earlier releases have none; some kinds are calm. */
export const levelOf = ({ level, kind }) => (["info", "warning", "error"].includes(level) ? level : CALM.has(kind) ? "info" : "warning");

export const words = (kind) => visible(String(kind).replaceAll("_", " "));

/** Ask the server for an address below /api/runs. Raises an error with the server's reason. */
export async function ask(path, parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const response = await fetch(`/api/runs${path}?${new URLSearchParams(given)}`);
  if (response.ok) return response.json();
  const answer = await response.json().catch(() => ({}));
  throw new Error(typeof answer.detail === "string" ? answer.detail : `The server answered with status ${response.status}.`);
}

/** Bring `runs` up to date. Returns whether anything is new for a view. */
export async function poll() {
  const states = await ask("");
  states.forEach((state, number) => {
    runs[number] ??= { number, steps: table(), evaluations: table(), events: [], eventsCursor: "" };
    runs[number].state = state;
  });
  const changed = await Promise.all(
    runs.flatMap((run) => [pollTable(run, "steps"), pollTable(run, "evaluations"), pollEvents(run)]),
  );
  return changed.some(Boolean);
}

const table = () => ({ columns: {}, bucket: 1, cursor: "", rows: 0 });

async function pollTable(run, name) {
  const answer = await ask(`/${run.number}/${name}`, { after: run[name].cursor });
  if (answer.cursor === run[name].cursor && answer.rows === run[name].rows) return false;
  const columns = answer.start === 0 ? {} : run[name].columns;
  for (const [figure, added] of Object.entries(answer.columns)) {
    const known = columns[figure] ?? {};
    columns[figure] = Object.fromEntries(
      Object.entries(added).map(([kind, values]) => [kind, before(known[kind], answer.start).concat(values)]),
    );
  }
  run[name] = { ...answer, columns };
  return true;
}

/** The first `length` values of a column, which is shorter or missing if the figure is new. */
function before(values, length) {
  const kept = (values ?? []).slice(0, length);
  return kept.concat(Array(length - kept.length).fill(null));
}

async function pollEvents(run) {
  const answer = await ask(`/${run.number}/events`, { after: run.eventsCursor });
  run.eventsCursor = answer.cursor;
  if (answer.events) run.events = answer.events;
  return Boolean(answer.events);
}

/** The steps of a run with warnings or errors, and what these are. */
export function alerts(run) {
  const kinds = new Map();
  for (const event of run.events) {
    const known = kinds.get(event.step) ?? new Set();
    if (Number.isFinite(event.step) && levelOf(event) !== "info") kinds.set(event.step, known.add(words(event.kind)));
  }
  return { run, x: [...kinds.keys()], text: [...kinds.values()].map((names) => [...names].join(", ")) };
}

/** The names of all figures of a run. Those of an evaluation begin with `eval.`. */
export const namesOf = (run) => [
  ...Object.keys(run.steps.columns).filter((name) => !name.startsWith("eval.")),
  ...Object.keys(run.evaluations.columns).map((name) => `eval.${name}`),
];

/** The points of a figure: `x`, `mean`, and with several steps per point `low` and `high`. Null if there are none. */
export function points(run, name) {
  const isEvaluation = name.startsWith("eval.");
  const { columns, bucket } = isEvaluation ? run.evaluations : run.steps;
  const column = columns[isEvaluation ? name.slice(5) : name];
  if (!columns.step || !column?.mean.some((value) => value !== null)) return null;
  return { ...column, x: columns.step[bucket === 1 ? "mean" : "high"] }; // a point stands at the last of its steps
}

/** The newest value of a figure, and null if there is none. */
export const last = (run, name) => points(run, name)?.mean.findLast((value) => value !== null) ?? null;

/** The highest value of a figure and its step, and null if there is none. */
export function best(run, name) {
  const found = points(run, name);
  if (!found) return null;
  const values = found.high ?? found.mean;
  const place = values.reduce((most, value, index) => (value !== null && (most < 0 || value > values[most]) ? index : most), -1);
  return place < 0 ? null : { value: values[place], step: found.x[place], isExact: !found.high };
}
