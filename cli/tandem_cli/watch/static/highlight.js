// Marks what a search has found in the open text. The text itself stays as it is.

/** Mark a text in all elements `selector` below `root`. An older browser marks nothing. */
export function highlight(root, selector, text) {
  if (!globalThis.CSS?.highlights) return;
  const ranges = text ? [...root.querySelectorAll(selector)].flatMap((element) => found(element, text.toLowerCase())) : [];
  CSS.highlights.set("found", new Highlight(...ranges));
}

function found(element, text) {
  const ranges = [];
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const whole = node.data.toLowerCase();
    if (whole.length !== node.data.length) continue; // some letters have a lower case of two characters
    for (let at = whole.indexOf(text); at >= 0; at = whole.indexOf(text, at + text.length)) {
      const range = document.createRange();
      range.setStart(node, at);
      range.setEnd(node, at + text.length);
      ranges.push(range);
    }
  }
  return ranges;
}
