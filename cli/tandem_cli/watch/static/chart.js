// One chart: a card with a title, the newest values as text, and curves drawn by plotly.js.

import { alerts, last, namesOf, points, runs } from "./data.js";
import { amount, el, isBytes, isShare } from "./text.js";

const DASHES = ["solid", "dot", "dash", "longdash", "dashdot"];
export const PLOTLY = "/plotly/plotly.min.js";
const SPARSE = 30; // Fewer points are drawn as points, too.
let loading = null;

/** Load plotly.js once. Raises an error if the server does not send it. It is large, so the page is shown before. */
export function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = el("script", { src: PLOTLY });
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => {
      loading = null; // the next drawing tries again
      script.remove();
      reject(new Error("plotly.js could not be loaded."));
    });
    document.head.append(script);
  });
  return loading;
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const color = (index) => style(`--series-${index % 8}`);

/** A card for `chart` of figures.js. `options.smoothing` is the weight of the past, from 0 to below 1. */
export class Chart {
  constructor(chart, options, choose) {
    this.chart = chart;
    this.options = options;
    this.choose = choose;
    this.legend = el("ul", { class: "legend" });
    this.plot = el("div", { class: "plot", "aria-hidden": "true" });
    const unit = chart.unit ? el("span", { class: "unit" }, chart.unit) : null;
    this.card = el("article", { class: "card", "aria-label": chart.title });
    this.problem = el("p", { class: "notice", role: "alert", hidden: true });
    this.card.append(el("h3", {}, chart.title, unit), this.legend, this.problem, this.plot);
    if (chart.hint) this.card.append(el("p", { class: "hint" }, chart.hint));
    this.isVisible = false;
    this.drawn = Promise.resolve();
  }

  /** Show the newest values, and draw the curves if the card is on the screen. */
  update() {
    this.legend.replaceChildren(...this.curves().map((curve) => this.entry(curve)));
    this.after(() => this.draw());
  }

  /** Free what plotly.js keeps for the card. */
  close() {
    this.isVisible = false;
    this.after(() => this.clickable && window.Plotly.purge(this.plot));
  }

  /** Do something after the drawing that goes on: plotly.js draws one after the other. */
  after(action) {
    this.drawn = this.drawn.catch(() => {}).then(action);
  }

  async draw() {
    if (!this.isVisible) return;
    if (!window.Plotly) await this.sketch();
    const Plotly = await plotly().catch((error) => {
      this.problem.textContent = `${error.message} The next step tries again.`;
    });
    this.problem.hidden = Boolean(Plotly);
    if (!Plotly || !this.isVisible) return;
    const curves = this.curves();
    if (!this.clickable) this.plot.replaceChildren(); // the sketch
    const traces = [...curves.flatMap((curve) => this.traces(curve, curves.length)), ...marks(curves)];
    await Plotly.react(this.plot, traces, layout(curves, Object.keys(this.chart.fields)), {
      displayModeBar: false,
      responsive: true,
    });
    if (this.clickable) return;
    this.clickable = true;
    this.plot.on("plotly_click", ({ points }) => this.choose(points[0].data.meta, points[0].x, points.map(({ data }) => data.legendgroup ?? "")));
  }

  /** Draw plain curves, and let the browser show them, before it spends a second on plotly.js. */
  async sketch() {
    if (!this.chart.stacked) this.plot.replaceChildren(sketch(this.curves()));
    await new Promise(requestAnimationFrame);
    await new Promise((resolve) => setTimeout(resolve));
  }

  curves() {
    const names = Object.keys(this.chart.fields);
    return runs.flatMap((run) =>
      names
        .filter((name) => points(run, name))
        .map((name) => {
          const place = names.indexOf(name);
          const label = [runs.length > 1 ? run.state.name : "", names.length > 1 || this.chart.match ? this.chart.fields[name] : "", this.functions(run, name)];
          return {
            run,
            name,
            label: label.filter(Boolean).join(" · "),
            color: color(runs.length > 1 ? run.number : place),
            dash: runs.length > 1 ? DASHES[place % DASHES.length] : "solid",
          };
        }),
    );
  }

  /** The reward functions behind a figure, if they are known and few. */
  functions(run, name) {
    const match = this.chart.functions?.[name];
    const found = match ? namesOf(run).flatMap((one) => match.exec(one)?.slice(1).filter(Boolean) ?? []) : [];
    return found.length <= 3 ? found.map((one) => one.split(":").at(-1)).join(" + ") : "";
  }

  entry({ run, name, label, color: shown, dash }) {
    const line = el("i", { class: `swatch is-${dash}` });
    line.style.borderColor = shown;
    return el("li", {}, line, label ? el("bdi", {}, label) : null, el("b", {}, amount(name, last(run, name))));
  }

  traces({ run, name, label, color: shown, dash }, curves) {
    const { x, mean, low, high } = points(run, name);
    const own = { x, y: mean, meta: run.number, legendgroup: name, name: (label || this.chart.title).replaceAll("<", "&lt;"), mode: "lines", connectgaps: true };
    const sparse = mean.filter((value) => value !== null).length < SPARSE;
    const line = { color: shown, width: 1.75, dash };
    const named = { ...own, line, hovertemplate: isShare(name) ? "%{y:.3~%}" : isBytes(name) ? "%{y:.3~s}B" : "%{y:.4~g}", ...(sparse && { mode: "lines+markers", marker: { size: 5 } }) };
    if (this.chart.stacked) return [{ ...named, stackgroup: String(run.number), fillcolor: `${shown}90`, line: { color: shown, width: 0.5 } }];
    if (this.options.smoothing && !sparse) {
      const faint = { ...own, opacity: 0.3, line: { color: shown, width: 1 }, hoverinfo: "skip" };
      return [faint, { ...named, y: smooth(mean, this.options.smoothing) }];
    }
    if (!low || curves > 4 || sparse) return [named];
    const edge = { ...own, hoverinfo: "skip", line: { width: 0, color: shown } };
    return [{ ...edge, y: low }, { ...edge, y: high, fill: "tonexty", fillcolor: `${shown}28` }, named];
  }
}

/** The curves as a picture without axes. */
function sketch(curves) {
  const make = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    element.append(...children);
    return element;
  };
  const drawn = curves.map((curve) => ({ ...curve, ...points(curve.run, curve.name) }));
  const span = (values) => {
    const known = values.filter((value) => value !== null);
    const low = known.reduce((one, other) => Math.min(one, other), Infinity);
    return { low, size: known.reduce((one, other) => Math.max(one, other), -Infinity) - low || 1 };
  };
  const [across, up] = [span(drawn.flatMap(({ x }) => x)), span(drawn.flatMap(({ mean }) => mean))];
  const place = (x, y) => `${(1000 * (x - across.low)) / across.size},${100 - (100 * (y - up.low)) / up.size}`;
  const lines = drawn.map(({ x, mean, color: stroke }) =>
    make("polyline", {
      points: mean.flatMap((y, index) => (y === null || x[index] === null ? [] : [place(x[index], y)])).join(" "),
      stroke,
      fill: "none",
      "vector-effect": "non-scaling-stroke",
    }),
  );
  return make("svg", { class: "sketch", viewBox: "0 0 1000 100", preserveAspectRatio: "none" }, ...lines);
}

/** Small triangles below the curves at the steps of warnings and errors. They name what happened. */
function marks(curves) {
  return [...new Set(curves.map(({ run }) => run))].map(alerts).filter(({ x }) => x.length).map(({ run, x, text }) => ({
    x,
    y: x.map(() => 0),
    yaxis: "y2",
    text: text.map((kinds) => kinds.replaceAll("<", "&lt;")),
    meta: run.number,
    name: "alert",
    mode: "markers",
    cliponaxis: false,
    marker: { symbol: "triangle-up", size: 8, color: style("--warn") },
    hovertemplate: "%{text}<extra></extra>",
  }));
}

/** Exponential moving average, corrected for its start at 0. */
function smooth(values, weight) {
  let total = 0;
  let share = 0;
  return values.map((value) => {
    if (value === null) return null;
    total = weight * total + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return total / share;
  });
}

/** The range of the y axis for curves that are one constant; undefined for others, for which plotly.js chooses it. */
function constantRange(curves) {
  const values = new Set(curves.flatMap(({ run, name }) => points(run, name).mean).filter((value) => value !== null));
  const [value] = values;
  return values.size === 1 && value !== 0 ? [Math.min(0, 2 * value), Math.max(0, 2 * value)] : undefined;
}

/** How the numbers at the y axis are written. */
function ticks(names) {
  if (names.every(isShare)) return { tickformat: "~%" };
  if (names.every(isBytes)) return { tickformat: "~s", ticksuffix: "B" };
  return names.includes("learning_rate") ? { exponentformat: "e" } : { tickformat: "~g" };
}

function layout(curves, names) {
  const line = { gridcolor: style("--grid"), zeroline: false, tickfont: { size: 11 }, linecolor: style("--grid") };
  return {
    height: 190,
    margin: { l: 46, r: 10, t: 6, b: 26 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style("--font"), color: style("--muted") },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), namelength: -1, font: { color: style("--text"), size: 12 } },
    dragmode: window.matchMedia("(pointer: fine)").matches ? "zoom" : false,
    xaxis: { ...line, nticks: 6, tickformat: ",d", hoverformat: ",d" },
    yaxis: { ...line, nticks: 5, ...ticks(names), automargin: true, fixedrange: true, range: constantRange(curves) },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    uirevision: "keep the zoom",
  };
}
