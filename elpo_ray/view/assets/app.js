// Routes, keys, theme, and news from a run that is still being written.

const POLL_MS = 3000;
const KEYS = [
  ["/", "search"],
  ["f", "next filter by outcome"],
  ["↑ ↓ ← →", "move along rows, or over the tree"],
  ["Enter", "open the chosen tree"],
  ["[  ]", "previous and next tree"],
  ["c", "to the critical step"],
  ["s", "next search of this tree"],
  ["t", "step, trajectory, tokens"],
  ["1 … 5", "colour by A, A_b, A_t, r, H"],
  ["z", "roomy or dense"],
  ["d", "dark or light"],
  ["Esc", "back to the run"],
];

const root = document.getElementById("app");
const state = { overview: null, rows: [], page: null };

function otherTheme() {
  switchTheme();
  route();
}

const help = h("dialog", { class: "help", "aria-label": "keys" },
  h("h2", {}, "Keys"),
  h("dl", {}, KEYS.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])),
  h("form", { method: "dialog" }, h("button", {}, "close")));
document.body.append(help);

function tools() {
  return h("span", { class: "tools" },
    button("◐", otherTheme, { title: "dark or light (d)", "aria-label": "dark or light" }),
    button("?", () => help.showModal(), { title: "keys (?)", "aria-label": "keys" }));
}

function show(page) {
  state.page?.observer?.disconnect();
  state.page = page;
  root.className = "";
  root.replaceChildren(page.element);
  page.shown();
}

function failure(text) {
  show({
    element: h("main", { class: "run" }, h("p", { class: "notices" }, text), h("p", {}, h("a", { href: "#/" }, "to the run"))),
    shown() {},
    key: () => false,
  });
}

function movesFrom(row) {
  const order = chosen(state.rows).filter((other) => other.chunk);
  const at = order.indexOf(row);
  const to = (other) => other && (() => {
    asked.active = chosen(state.rows).indexOf(other);
    location.hash = hrefOf(other);
  });
  return { previous: to(order[at - 1]), next: to(at < 0 ? order[0] : order[at + 1]), place: at < 0 ? "" : `${at + 1} / ${order.length}` };
}

async function route() {
  const [, kind, step, line] = location.hash.split("/");
  if (kind !== "tree") {
    document.title = `${state.overview.name} · elpo_ray`;
    show(runPage(state.overview, state.rows));
    return;
  }
  const row = state.rows.find((one) => one.step === Number(step) && one.line === Number(line));
  if (!row) return failure(`This run has no tree in line ${line} of step ${step}.`);
  if (!row.chunk) return failure("This tree is listed but not on the page; serve the run with --serve to open it.");
  document.title = `${row.task}, step ${row.step} · ${state.overview.name}`;
  const hash = location.hash;
  try {
    const tree = await loadTree(row);
    if (location.hash === hash) show(new TreePage(state.overview, row, tree, movesFrom(row)));
  } catch (error) {
    failure(`This tree cannot be shown: ${error.message}`);
  }
}

function take(overview) {
  state.overview = overview;
  state.rows = rowsOf(overview.table);
}

async function follow() {
  try {
    const overview = await source.overview();
    root.classList.remove("lost");
    if (overview) {
      take(overview);
      if (!location.hash.startsWith("#/tree/")) await route();
    }
  } catch {
    root.classList.add("lost");
  }
  setTimeout(follow, POLL_MS);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open || !state.page) return;
  const typing = event.target.matches?.("input, textarea, select");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.target.closest?.(".scroller") && event.defaultPrevented) return;
  if (event.target.matches?.("button, summary, a") && event.key === "Enter") return;
  if (event.target.closest?.(".details-body") && event.key.startsWith("Arrow")) return;
  if (event.key === "?") help.showModal();
  else if (event.key === "d") otherTheme();
  else if (!state.page.key(event)) return;
  event.preventDefault();
});
window.addEventListener("hashchange", route);

async function begin() {
  startTheme();
  try {
    take(await source.overview());
  } catch (error) {
    root.replaceChildren(h("p", { class: "notices" }, `The page's data cannot be read: ${error.message}`));
    return;
  }
  await route();
  document.documentElement.dataset.ready = "yes";
  performance.mark("ready");
  if (LIVE) setTimeout(follow, POLL_MS);
}
begin();
