// Runs beside each other: settings that differ, figures, curves over a chosen axis.

const AXIS_NAMES = { steps: "steps", rollouts: "rollouts", tokens: "tokens sampled", seconds: "training seconds" };
const SHOWN = [
  { title: "pass@1, training inputs", key: "pass_at_1", percent: true },
  { title: "reward", key: "reward" },
  { title: "right, by the oracle", key: "localization_accuracy", percent: true },
  { title: "searches", key: "searches" },
  { title: "critical steps named", key: "critical_found" },
  { title: "depth of the critical step", key: "critical_depth" },
  { title: "entropy of the first turn", key: "entropy_root" },
  { title: "entropy after a tool", key: "entropy_tool" },
];
const view = { axis: "rollouts", common: false, all: false };

const finite = (x) => (typeof x === "number" ? x : null);

function summaryCell(key, value, error) {
  if (!known(value)) return "–";
  if (key.startsWith("pass_at_1") || key === "localization_accuracy") {
    return percent(value) + (known(error) ? ` ± ${(100 * error).toFixed(1)}` : "");
  }
  return key === "wall_seconds" ? duration(value) : whole(finite(value));
}

function tableOf(runs, title, rows, note) {
  return h("section", {}, h("h2", {}, title), note && h("p", { class: "note small" }, note),
    h("table", { class: "compare" },
      h("thead", {}, h("tr", {}, h("th", {}), runs.map((run, i) => h("th", { scope: "col", class: `ink-${i}` }, run.name)))),
      h("tbody", {}, rows.map(([name, cells]) =>
        h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", {}, cell)))))));
}

// Mean of the last values up to a budget on the chosen axis.
function figure(run, key, budget, window) {
  const values = (run.metrics[key] ?? []).filter((y, i) => known(y) && known(run.axes[view.axis][i]) && run.axes[view.axis][i] <= budget);
  const last = values.slice(-window);
  return last.length ? sumOf(last) / last.length : null;
}

const sumOf = (values) => values.reduce((total, x) => total + x, 0);

function figureTable({ runs, figures, common, window }) {
  const budget = common[view.axis];
  const rows = figures.map((key) => [key, runs.map((run) => {
    const end = brief(figure(run, key, Infinity, window));
    return known(budget) ? [end, h("span", { class: "muted" }, `  ${brief(figure(run, key, budget, window))}`)] : end;
  })]);
  const note = known(budget)
    ? `Means of the last ${window} steps: at the end of each run and, grey, up to ${brief(budget)} ${AXIS_NAMES[view.axis]}, which all runs reached.`
    : `Means of the last ${window} steps.`;
  return tableOf(runs, "Training", rows, note);
}

const isHeldOut = (key) => HELD_OUT.test(key);
const heldOutTitle = (key) => ["held-out pass@1", HELD_OUT.exec(key)[1]].filter(Boolean).join(", ");

function seriesOf(data, key) {
  const budget = view.common ? data.common[view.axis] : null;
  return data.runs.map((run, i) => {
    const x = run.axes[view.axis];
    const of = (name, k) => run.metrics[name]?.[k] ?? null;
    const kept = x.map((at, k) => k).filter((k) => known(x[k]) && (!known(budget) || x[k] <= budget)
      && (!isHeldOut(key) || known(of(key, k))));
    const line = { name: run.name, x: kept.map((k) => x[k]), y: kept.map((k) => of(key, k)), style: i };
    if (isHeldOut(key)) {
      line.low = kept.map((k) => of(`${key}_low`, k));
      line.high = kept.map((k) => of(`${key}_high`, k));
    }
    return line;
  }).filter((one) => one.y.some(known));
}

function curvesOf(data) {
  const cursor = new Cursor();
  const evaluated = [...new Set(data.runs.flatMap((run) => Object.keys(run.metrics)))].filter(isHeldOut).sort(wholeFirst);
  const first = evaluated.map((key) => ({ title: heldOutTitle(key), key, percent: true }));
  const shown = [...first, ...SHOWN].filter(({ key }) => data.runs.some((run) => run.metrics[key]?.some(known)));
  if (view.all) {
    const keys = new Set(data.runs.flatMap((run) => Object.keys(run.metrics)));
    for (const { key } of shown) keys.delete(key);
    keys.delete("step");
    shown.push(...[...keys].map((key) => ({ title: key, key })));
  }
  const figures = shown.map(({ title, key, percent: asPercent }) => ({ title, series: seriesOf(data, key), asPercent }))
    .filter(({ series }) => series.length)
    .map(({ title, series, asPercent }) =>
      lineChart({ title, series, cursor, axis: AXIS_NAMES[view.axis], percent: asPercent, keys: false }));
  return h("div", { class: "charts" }, figures);
}

function pageOf(data, redraw) {
  const { runs, differences, summary, errors, notices, common, held_out: heldOut } = data;
  const axes = Object.keys(AXIS_NAMES).filter((axis) => runs.every((run) => run.axes[axis].some(known)));
  if (!axes.includes(view.axis)) view.axis = axes[0] ?? "steps";
  const press = (name, value, label) => button(label, () => {
    view[name] = value;
    redraw();
  }, { "aria-pressed": String(view[name] === value) });
  return h("main", { class: "run" },
    h("header", { class: "head" }, h("h1", {}, plural(runs.length, "run")),
      h("span", { class: "keys" }, runs.map((run, i) => h("span", {}, sample(i), h("b", { class: `ink-${i}` }, run.name),
        [run.algorithm, known(run.seed) && `seed ${run.seed}`, !run.finished && "not finished"].filter(Boolean).join(", ")))),
      h("span", { class: "tools" }, button("◐", () => {
        switchTheme();
        redraw();
      }, { "aria-label": "dark or light" }))),
    notices.length > 0 && h("details", { class: "notices", open: true, role: "note" },
      h("summary", {}, "Before you compare"),
      h("ul", {}, notices.map(({ text, where }) => h("li", {}, text, h("span", { class: "where" }, ` ${where.join(", ")}`))))),
    h("div", { class: "controls" },
      h("span", { class: "muted" }, "over"), h("div", { class: "segments", role: "group", "aria-label": "axis" },
        axes.map((axis) => press("axis", axis, AXIS_NAMES[axis]))),
      known(common[view.axis]) && h("div", { class: "segments", role: "group", "aria-label": "range" },
        press("common", false, "whole runs"), press("common", true, `up to ${brief(common[view.axis])}, the common budget`)),
      h("div", { class: "segments" }, press("all", false, "main metrics"), press("all", true, "all"))),
    axes.length ? curvesOf(data) : h("p", { class: "note" }, "No axis on which every run has logged a step."),
    Object.keys(heldOut).length > 0 && tableOf(runs, "Held-out pass@1", Object.entries(heldOut),
      "Evaluations while the run trained, with the 95 % interval over problems."),
    Object.keys(summary).length > 0 && tableOf(runs, "At the end",
      Object.entries(summary).map(([key, row]) => [key, row.map((value, i) => summaryCell(key, value, errors[key][i]))]),
      "Held-out pass@1 with its standard error over problems, at most."),
    figureTable(data),
    Object.keys(differences).length
      ? tableOf(runs, "Settings that differ", Object.entries(differences))
      : h("p", { class: "note" }, "The configurations are the same."));
}

async function begin() {
  startTheme();
  const data = await source.overview();
  const root = document.getElementById("app");
  root.className = "";
  const redraw = () => root.replaceChildren(pageOf(data, redraw));
  redraw();
  document.documentElement.dataset.ready = "yes";
}
begin();
