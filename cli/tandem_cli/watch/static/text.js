// Text of a model on the page. It is only ever put into text nodes, so HTML in it is shown and not interpreted.

const FOLDED = 2000;
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\u{e0000}-\u{e007f}]/gu;

/** Make an element. `properties` are set on it: `class` and those with a dash are attributes, others are properties. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Make characters visible that would be invisible or change how the text around them is shown: ESC, U+202E, ... */
export function visible(text) {
  return text.replace(CONTROL, (sign) => `⟨U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

/** One line of a text that may be long. */
export function line(text, length = 160) {
  const start = visible(text.slice(0, length).replace(/\s+/g, " ")).trim();
  return el("bdi", {}, text.length > length ? `${start}…` : start);
}

/** A complete text, with line breaks. A long one is folded, with a button that shows all of it. */
export function block(text, kind = "text") {
  const shown = el("div", { class: kind, dir: "auto", tabIndex: -1 }, visible(text.slice(0, FOLDED)));
  if (text.length <= FOLDED) return shown;
  shown.append("…");
  const unfold = el("button", { type: "button", class: "unfold" }, `Show all ${count(text.length)} characters`);
  unfold.addEventListener("click", () => {
    shown.textContent = visible(text);
    unfold.remove();
    shown.focus();
  });
  return el("div", {}, shown, unfold);
}

export const count = (value) => value.toLocaleString("en-US");

export const many = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** A number with about four digits. */
export function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return count(value);
  if (size >= 1e5 || (size < 1e-3 && size > 0)) return value.toExponential(2);
  if (size >= 1000) return count(Math.round(value));
  return String(Number(value.toPrecision(4)));
}

/** A figure in its unit: a share as percent, a size in bytes with a prefix. */
export function amount(name, value) {
  if (value === null || value === undefined) return "–";
  if (isShare(name)) return `${figure(Number((100 * value).toPrecision(3)))} %`;
  return isBytes(name) ? size(value) : figure(value);
}

export const isShare = (name) => /_fraction$|clipped_ratio|^clip_ratio\/|^rewards\/accuracies$/.test(name);
export const isBytes = (name) => /_bytes$/.test(name);

/** A number of bytes, such as `1.5 GB`. */
function size(bytes) {
  const prefix = Math.min(4, Math.max(0, Math.floor(Math.log10(Math.abs(bytes) || 1) / 3)));
  return `${Number((bytes / 1000 ** prefix).toPrecision(3))} ${["", "k", "M", "G", "T"][prefix]}B`;
}

/** A duration, such as `2 h 5 min`. */
export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}
