// Small line charts that share one cursor.

// Metrics of held-out pass@1: of all problems, or of one benchmark, which is named. The former come first.
const HELD_OUT = /^eval\/(?:(.+)\/)?pass_at_1$/;
const wholeFirst = (a, b) => a.split("/").length - b.split("/").length || a.localeCompare(b);

const CHART = { width: 320, wide: 720, height: 118, left: 40, right: 8, top: 8, bottom: 18 };

function niceTicks(low, high) {
  const span = high - low || Math.abs(high) || 1;
  const raw = span / 3;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((x) => x * size).find((x) => x >= raw);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    ticks.push(i * step);
  }
  return ticks;
}

function tickText(x) {
  return Math.abs(x) >= 1e4 ? brief(x) : String(Number(x.toPrecision(6))).replace("-", MINUS);
}

function extent(lists) {
  let [low, high] = [Infinity, -Infinity];
  for (const list of lists) {
    for (const x of list) {
      if (!known(x)) continue;
      if (x < low) low = x;
      if (x > high) high = x;
    }
  }
  return [low, high];
}

// Charts of one group move their cursors together: `point(x)` is told to all of them.
class Cursor {
  constructor() {
    this.charts = [];
  }
  point(x) {
    for (const chart of this.charts) chart(x);
  }
}

// One chart. `series`: {name, x, y, style}, style counting from 0, with `low` and `high` where a band lies
// around the line; `percent` formats values, `pick` is told of a click, without `keys` the series are named
// elsewhere, `wide` takes the whole width.
function lineChart({ title, series, cursor, axis, percent: asPercent, pick, keys = true, wide = false }) {
  const { height, left, right, top, bottom } = CHART;
  const width = wide ? CHART.wide : CHART.width;
  const format = asPercent ? percent : brief;
  const [x0, x1] = extent(series.map((one) => one.x));
  let [y0, y1] = extent(series.flatMap((one) => [one.y, one.low ?? [], one.high ?? []]));
  if (y0 > 0 && y0 < 0.5 * y1) y0 = 0;
  if (y1 - y0 < 1e-12 * Math.max(1, Math.abs(y1))) [y0, y1] = [y0 - 0.5, y1 + 0.5];
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
  const py = (y) => top + ((y1 - y) / (y1 - y0)) * (height - top - bottom);
  const svg = s("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `${title}: ${series.map((one) => describe(one, format)).join("; ")}`,
  });
  for (const tick of niceTicks(y0, y1)) {
    svg.append(
      s("line", { class: "grid", x1: left, x2: width - right, y1: py(tick), y2: py(tick) }),
      s("text", { class: "tick", x: left - 5, y: py(tick) + 3, "text-anchor": "end" },
        asPercent ? `${Number((100 * tick).toPrecision(3))}%` : tickText(tick)),
    );
  }
  svg.append(
    s("text", { class: "tick", x: left, y: height - 4 }, brief(x0)),
    s("text", { class: "tick", x: width - right, y: height - 4, "text-anchor": "end" },
      `${axis} ${brief(x1)}`),
  );
  for (const one of series) {
    if (one.low) svg.append(s("path", { class: `band band-${one.style}`, d: bandOf(one, px, py) }));
    svg.append(s("path", { class: `line line-${one.style}`, d: pathOf(one, px, py) }));
    const points = one.x.length;
    if (points <= 30) {
      one.x.forEach((x, i) => {
        if (known(one.y[i])) {
          const at = { cx: px(x), cy: py(one.y[i]), r: points === 1 ? 3 : 1.8 };
          svg.append(s("circle", { class: `point point-${one.style}`, ...at }));
        }
      });
    }
  }
  const hair = s("line", { class: "hair", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(hair);
  const readout = h("span", { class: "readout" });
  const show = (x) => {
    const at = x === null ? null : x;
    readout.replaceChildren(...readings(series, at, format, axis));
    const inside = at !== null && at >= x0 && at <= x1;
    hair.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) {
      hair.setAttribute("x1", px(at));
      hair.setAttribute("x2", px(at));
    }
  };
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const x = x0 + (((event.clientX - box.left) / box.width) * width - left)
      / (width - left - right) * (x1 - x0);
    return closest(series.flatMap((one) => one.x), x);
  };
  svg.addEventListener("pointermove", (event) => cursor.point(nearest(event)));
  svg.addEventListener("pointerleave", () => cursor.point(null));
  if (pick) svg.addEventListener("click", (event) => pick(nearest(event)));
  cursor.charts.push(show);
  show(null);
  const names = keys && (series.length > 1 || series[0].name !== title);
  return h("figure", { class: `chart${pick ? " pickable" : ""}${wide ? " wide" : ""}` },
    h("figcaption", {}, h("b", {}, title), readout),
    svg,
    names && h("div", { class: "keys" }, series.map((one) =>
      h("span", {}, sample(one.style), one.name))));
}

function sample(style) {
  return s("svg", { class: "sample", viewBox: "0 0 22 8" },
    s("path", { class: `line line-${style}`, d: "M1 4H21" }));
}

function pathOf({ x, y }, px, py) {
  let [d, pen] = ["", "M"];
  x.forEach((at, i) => {
    if (!known(y[i])) {
      pen = "M";
      return;
    }
    d += `${pen}${px(at).toFixed(1)} ${py(y[i]).toFixed(1)}`;
    pen = "L";
  });
  return d;
}

// Along the upper ends and back along the lower ones.
function bandOf({ x, low, high }, px, py) {
  const inside = x.map((_, i) => i).filter((i) => known(low[i]) && known(high[i]));
  const corner = (ends) => (i) => `${px(x[i]).toFixed(1)} ${py(ends[i]).toFixed(1)}`;
  const corners = [...inside.map(corner(high)), ...inside.reverse().map(corner(low))];
  return corners.length ? `M${corners.join("L")}Z` : "";
}

function closest(list, x) {
  let best = null;
  for (const one of list) if (best === null || Math.abs(one - x) < Math.abs(best - x)) best = one;
  return best;
}

// Values at x, or the last ones.
function readings(series, x, format, axis) {
  const cells = series.map((one) => {
    const at = x === null ? lastKnown(one.y) : one.x.indexOf(closest(one.x, x));
    const value = at < 0 ? null : one.y[at];
    const ends = at >= 0 && known(one.low?.[at]) ? ` (${format(one.low[at])} to ${format(one.high[at])})` : "";
    return h("span", { class: `ink-${one.style}` }, format(value) + ends);
  });
  return x === null ? cells : [h("span", { class: "muted" }, `${axis} ${brief(x)}`), ...cells];
}

function lastKnown(values) {
  for (let i = values.length - 1; i >= 0; i--) if (known(values[i])) return i;
  return -1;
}

function describe(one, format) {
  const values = one.y.filter(known);
  if (!values.length) return `${one.name} has no values`;
  return `${one.name} from ${format(values[0])} to ${format(values.at(-1))}`;
}
