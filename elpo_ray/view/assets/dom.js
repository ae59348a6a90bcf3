// Elements, numbers and text. Text becomes text nodes only: what a model wrote is never markup.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

const h = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);

function button(label, press, attributes = {}) {
  return h("button", { type: "button", onclick: press, ...attributes }, label);
}

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const known = (x) => x !== null && x !== undefined;
const MINUS = "\u2212";

// A number in at most about six characters, with a real minus.
function brief(x) {
  if (!known(x)) return "–";
  const size = Math.abs(x);
  let text;
  if (Number.isInteger(x) && size < 1e4) text = String(size);
  else if (size >= 1e6) text = `${(size / 1e6).toPrecision(3)}M`;
  else if (size >= 1e4) text = `${(size / 1e3).toPrecision(3)}k`;
  else if (size >= 100) text = size.toFixed(0);
  else if (size >= 1) text = size.toFixed(2);
  else if (size >= 0.01) text = size.toFixed(3);
  else if (size === 0) text = "0";
  else text = size.toExponential(1);
  return (x < 0 ? MINUS : "") + text;
}

function signed(x, digits = 2) {
  if (!known(x)) return "–";
  const text = Math.abs(x).toFixed(digits);
  if (Number(text) === 0) return text;
  return (x < 0 ? MINUS : "+") + text;
}

const percent = (x) => (known(x) ? `${(100 * x).toFixed(1)}%` : "–");
const whole = (x) => (known(x) ? Math.round(x).toLocaleString("en-US") : "–");

function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 1) return `${brief(Number((1000 * seconds).toPrecision(2)))} ms`;
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;
const flat = (text) => text.replace(/\s+/g, " ").trim();
const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

// What a browser may refuse to keep (a page opened from a file, a private window) is not kept.
const memory = {
  get(key) {
    try {
      return localStorage.getItem(`elpo_ray.${key}`);
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      localStorage.setItem(`elpo_ray.${key}`, value);
    } catch {
      // the choice lasts as long as the page
    }
  },
};
