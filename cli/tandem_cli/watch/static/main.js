// The page: which view is shown, the runs in its head, and a look for news every two seconds.

import { color, PLOTLY } from "./chart.js";
import { poll, runs } from "./data.js";
import { Events } from "./events.js";
import { Overview } from "./overview.js";
import { Rollouts } from "./rollouts.js";
import { count, duration, el } from "./text.js";

const EVERY_MS = 2000;
const VIEWS = { overview: Overview, rollouts: Rollouts, events: Events };
const ENDED = new Set(["finished", "stopped", "failed"]);
const main = document.getElementById("main");
const offline = document.getElementById("offline");
let view = null;
let shown = "";

/** Open a view. `quietly` only changes the address, so that it can be copied. */
function go(name, parameters = {}, quietly = false) {
  const hash = `#${name}?${new URLSearchParams(parameters)}`;
  if (quietly) window.history.replaceState(null, "", hash);
  else window.location.hash = hash;
  if (quietly) shown = hash;
}

function route() {
  if (!runs.length || (view && window.location.hash === shown)) return;
  shown = window.location.hash;
  const [name, parameters] = shown.slice(1).split("?");
  const known = Object.hasOwn(VIEWS, name) ? name : "overview";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${known}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  view?.close();
  view = null; // if the view cannot be made, the next look tries again
  document.title = `${known[0].toUpperCase()}${known.slice(1)} · ${runs.map((run) => run.state.name).join(", ")}`;
  view = new VIEWS[known](main, go, new URLSearchParams(parameters));
}

function showRuns() {
  const items = runs.map(({ state, number }) => {
    const dot = el("i", { class: `dot${ENDED.has(state.phase) ? "" : " live"}` });
    dot.style.background = color(number);
    return el("li", {}, dot, el("bdi", { class: "run-name" }, state.name), el("span", { class: "muted" }, describe(state)));
  });
  if (!items.length) items.push(el("li", { class: "muted" }, "No run has started yet. The page shows it as soon as it does."));
  document.getElementById("runs").replaceChildren(...items);
}

function describe({ exists, phase, phase_s: since, step, max_steps: steps, version }) {
  if (!exists) return "has not started yet";
  const progress = step === null ? "" : `step ${count(step)}${steps ? ` of ${count(steps)}` : ""}`;
  const doing = phase ? phase.replaceAll("_", " ") : "";
  const lasting = doing && !ENDED.has(phase) && since !== null ? `${doing} for ${duration(since)}` : doing;
  return [progress, lasting, version ? `version ${version}` : ""].filter(Boolean).join(" · ");
}

/** Ask for news and show them. The page stays as it is while the server does not answer. */
async function refresh() {
  let problem = "No news from the server of this page";
  try {
    const isNew = await poll();
    problem = "The page cannot show what the server has sent";
    showRuns();
    if (!view) route();
    else if (isNew || view instanceof Rollouts) view.update();
    offline.hidden = true;
  } catch (error) {
    offline.textContent = `${problem}: ${error.message}. It asks again.`;
    offline.hidden = false;
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

if (!/^#(rollouts|events)/.test(window.location.hash)) {
  document.head.append(el("link", { rel: "preload", as: "script", href: PLOTLY })); // while the data is read
}
window.addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => document.hidden || refresh());
run();
