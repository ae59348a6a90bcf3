// Colour scales: blue for good, orange for bad, which differ in lightness too, so that they can be
// told apart with any colour vision; outcomes carry a sign of their own beside the colour.

const SIGNS = { success: "✓", failure: "✗", ungraded: "?" };
const STOPS = {
  light: {
    diverging: ["#b04a08", "#ea9a55", "#f2f1ee", "#85b6de", "#17609f"],
    sequential: ["#f2f1ee", "#6fb3ab", "#0b5258"],
  },
  dark: {
    diverging: ["#f59242", "#8a4c1f", "#2a3038", "#2b608f", "#6cb4f5"],
    sequential: ["#2a3038", "#267378", "#85e0d4"],
  },
};

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

// The colour at `at` in [0, 1] and what to write in on top of it.
function mixed(stops, at) {
  const place = clamp(at, 0, 1) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const [low, high] = [channels(stops[below]), channels(stops[below + 1])];
  const rgb = low.map((x, i) => x + (high[i] - x) * (place - below));
  const linear = rgb.map((x) => (x / 255) ** 2.2);
  const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return {
    fill: `rgb(${rgb.map(Math.round).join(",")})`,
    ink: luminance > 0.2 ? "#14181d" : "#ffffff",
  };
}

const stopsOf = (kind) => STOPS[dark() ? "dark" : "light"][kind];

const MEASURES = {
  advantage: { name: "A", long: "advantage that trains the step", sign: true },
  a_branch: { name: "A_b", long: "branch level: among its siblings", sign: true },
  a_traj: { name: "A_t", long: "trajectory level: mean over its leaves", sign: true },
  r: { name: "r", long: "step reward: mean over its children", sign: true },
  entropy: { name: "H", long: "mean token entropy of the turn, nats", sign: false },
};

// Colours of one measure over a tree, by node id. Signed measures are centred on 0.
function scaleOf(tree, measure) {
  const { sign } = MEASURES[measure];
  const values = tree.nodes.map(({ id }) => (id ? tree.value(measure, id) : null)).filter(known);
  const top = Math.max(1e-9, ...values.map(Math.abs));
  const stops = stopsOf(sign ? "diverging" : "sequential");
  const at = (x) => mixed(stops, sign ? 0.5 + x / top / 2 : x / top);
  const none = { fill: "var(--surface)", ink: "var(--ink)" };
  return {
    of: (id) => {
      const x = tree.value(measure, id);
      return id && known(x) ? at(x) : none;
    },
    at,
    low: sign ? -top : 0,
    high: top,
    stops,
    empty: !values.length,
  };
}

function legend(scale, measure) {
  const gradient = `linear-gradient(to right, ${scale.stops.join(",")})`;
  return h(
    "span",
    { class: "legend", title: MEASURES[measure].long },
    MEASURES[measure].sign ? signed(scale.low) : brief(scale.low),
    h("i", { style: `background:${gradient}` }),
    MEASURES[measure].sign ? signed(scale.high) : brief(scale.high),
  );
}
