// The run page: what the run is, how it went by step, and every tree that it grew.

const CHARTS = [
  { title: "pass@1, training inputs", percent: true, keys: { "pass@1": "pass_at_1" } },
  { title: "reward", keys: { reward: "reward" } },
  { title: "searches", keys: { begun: "searches", "step named": "critical_found" } },
  { title: "right, by the oracle", percent: true, keys: { right: "localization_accuracy" } },
  { title: "depth of the critical step", keys: { depth: "critical_depth" } },
  { title: "entropy, nats", keys: { "first turn": "entropy_root", "after a tool": "entropy_tool" } },
  { title: "clipped low", percent: true,
    keys: { "in the ELC region": "clip_low_inside", outside: "clip_low_outside" } },
  { title: "rollouts", keys: { "from the prompt": "rollouts_root", probes: "rollouts_probe" } },
  { title: "loss", keys: { loss: "loss" } },
  { title: "gradient norm", keys: { norm: "grad_norm" } },
  { title: "tokens per second", keys: { "tokens/s": "tokens_per_second" } },
  { title: "seconds", keys: { growth: "seconds/grow", update: "seconds/update", evaluation: "seconds/evaluate" } },
];
const SHOWN = 8;

// The learning curve: held-out pass@1 of the steps that were evaluated, each benchmark a line.
function heldOutChart(metrics, cursor, pick) {
  const keys = Object.keys(metrics).filter((key) => HELD_OUT.test(key)).sort(wholeFirst);
  const series = keys.map((key, style) => heldOutLine(metrics, key, style));
  if (!series.length) return null;
  const title = "held-out pass@1";
  if (series.length === 1) series[0].name = title;
  return h("div", { class: "leading" },
    lineChart({ title, series, cursor, axis: "step", percent: true, pick, wide: true }),
    h("p", { class: "note small" }, "The band is the 95 % interval over problems; step 0 is the model before training."));
}

function heldOutLine(metrics, key, style) {
  const at = metrics.step.map((_, i) => i).filter((i) => known(metrics[key][i]));
  const of = (name) => at.map((i) => metrics[name]?.[i] ?? null);
  return { name: HELD_OUT.exec(key)[1] ?? "all problems", x: of("step"), y: of(key),
    low: of(`${key}_low`), high: of(`${key}_high`), style };
}

const lineOfMetric = (metrics, key, name, style) =>
  ({ name, x: metrics.step, y: metrics[key], style });

function chartsOf(metrics, cursor, pick) {
  const has = (key) => metrics[key]?.some(known);
  const used = new Set(["step", ...Object.keys(metrics).filter((key) => key.startsWith("eval/") && /pass_at_1/.test(key))]);
  const figures = [];
  for (const { title, percent: asPercent, keys } of CHARTS) {
    const series = Object.entries(keys).filter(([, key]) => has(key))
      .map(([name, key], i) => lineOfMetric(metrics, key, name, i));
    for (const key of Object.values(keys)) used.add(key);
    if (series.length === 0) continue;
    if (series.length === 1 && Object.keys(keys).length === 1) series[0].name = title;
    figures.push(lineChart({ title, series, cursor, axis: "step", percent: asPercent, pick }));
  }
  for (const key of Object.keys(metrics)) {
    if (used.has(key) || !has(key)) continue;
    const series = [lineOfMetric(metrics, key, key, 0)];
    figures.push({ later: () => lineChart({ title: key, series, cursor, axis: "step", pick }) });
  }
  return figures;
}

// The first charts; the others when they are asked for.
function curves(metrics, pick) {
  if (!metrics.step?.length) {
    return h("p", { class: "note" }, "No step has been logged yet: metrics.jsonl has no line.");
  }
  const cursor = new Cursor();
  const leading = heldOutChart(metrics, cursor, pick);
  const figures = chartsOf(metrics, cursor, pick);
  const named = Math.min(SHOWN, figures.filter((one) => !one.later).length);
  const grid = h("div", { class: "charts" }, figures.slice(0, named));
  const rest = figures.slice(named);
  const more = rest.length > 0 && button(`${rest.length} more curves`, () => {
    more.remove();
    grid.append(...rest.map((one) => one.later?.() ?? one));
  }, { class: "quiet" });
  return h("section", { "aria-label": "curves by step" }, leading, grid, more);
}

const sum = (values) => (values ?? []).reduce((total, x) => total + (x ?? 0), 0);

function tile(name, value, note) {
  return h("div", { class: "tile" }, h("span", {}, name), h("b", {}, value), note && h("small", {}, note));
}

function tiles({ summary, metrics, table }) {
  const made = [];
  if (known(summary.pass_at_1_after) && known(summary.pass_at_1_before)) {
    const gain = 100 * (summary.pass_at_1_after - summary.pass_at_1_before);
    made.push(tile("held-out pass@1", percent(summary.pass_at_1_after),
      `from ${percent(summary.pass_at_1_before)}, ${signed(gain, 1)} points`));
  } else if (metrics["eval/pass_at_1"]) {
    const at = lastKnown(metrics["eval/pass_at_1"]);
    made.push(tile("held-out pass@1", percent(metrics["eval/pass_at_1"][at]), `step ${metrics.step[at]}`));
  } else if (metrics.pass_at_1) {
    made.push(tile("pass@1 on training inputs", percent(metrics.pass_at_1[lastKnown(metrics.pass_at_1)]), "last step"));
  }
  const searches = sum(metrics.searches);
  if (searches) {
    const named = sum(metrics.critical_found);
    made.push(tile("critical steps named", whole(named), `in ${percent(named / searches)} of ${plural(searches, "search", "searches")}`));
  }
  if (known(summary.localization_accuracy)) {
    made.push(tile("named rightly", percent(summary.localization_accuracy),
      `of ${whole(summary.localizations_judged)} the oracle judged`));
  }
  const rollouts = summary.rollouts ?? sum(metrics.rollouts);
  if (rollouts) made.push(tile("rollouts", whole(rollouts), `${plural(table.step?.length ?? 0, "tree")}`));
  const tokens = summary.tokens_generated ?? sum(metrics.tokens_generated);
  if (tokens) made.push(tile("tokens sampled", brief(tokens)));
  const seconds = summary.wall_seconds ?? metrics["total/wall_seconds"]?.at(-1);
  if (known(seconds)) made.push(tile("wall clock", duration(seconds)));
  return made.length > 0 && h("section", { class: "tiles", "aria-label": "summary" }, made);
}

function noticesOf(notices) {
  if (!notices.length) return null;
  const total = notices.reduce((all, one) => all + one.count, 0);
  const list = notices.map(({ text, count, where }) =>
    h("li", {}, text, h("span", { class: "where" },
      ` ${where.join(", ")}${count > where.length ? ` and ${whole(count - where.length)} more` : ""}`)));
  return h("details", { class: "notices", open: notices.length <= 3, role: "note" },
    h("summary", {}, `${plural(total, "thing")} in this folder could not be shown as it should; the rest is below`),
    h("ul", {}, list));
}

function stateOf({ finished, planned, metrics, changed, read }) {
  const done = metrics.step?.at(-1) ?? 0;
  if (finished) return h("span", { class: "state done" }, `finished, ${plural(done, "step")}`);
  const of = planned ? ` of ${planned}` : "";
  const age = changed ? `, last written ${duration(Math.max(0, read - changed))} before this was read` : "";
  return h("span", { class: "state open", title: "no summary.json yet: still being written, or ended early" },
    `${LIVE ? "following: " : "not finished: "}${done}${of} steps${age}`);
}

function runPage(overview, rows) {
  const { algorithm } = overview;
  const table = new TreeTable(rows, (row) => {
    location.hash = hrefOf(row);
  });
  const pick = (step) => {
    table.atStep(step);
    table.element.scrollIntoView({ behavior: "smooth" });
  };
  const facts = [overview.experiment, algorithm.name, overview.model ?? overview.task,
    known(overview.seed) && `seed ${overview.seed}`].filter(Boolean);
  const settings = overview.config && h("details", { class: "config" },
    h("summary", {}, "configuration"), h("pre", {}, overview.config));
  const page = h("main", { class: "run" },
    h("header", { class: "head" },
      h("h1", {}, overview.name), stateOf(overview),
      h("span", { class: "facts" }, facts.map((fact) => h("span", {}, fact))),
      tools()),
    noticesOf(overview.notices),
    tiles(overview),
    curves(overview.metrics, pick),
    table.element,
    settings);
  return {
    element: page,
    shown() {
      table.scroller.scrollTop = asked.scroll;
      table.draw();
    },
    key(event) {
      if (event.key === "/") table.input.focus();
      else if (event.key === "f") {
        const names = table.chips.map((chip) => chip.dataset.name);
        asked.filter = names[(names.indexOf(asked.filter) + 1) % names.length];
        table.update(true);
      } else if (["ArrowDown", "ArrowUp", "Enter", "j", "k"].includes(event.key)) {
        table.scroller.focus();
        table.key(event);
        return true;
      } else return false;
      return true;
    },
  };
}
