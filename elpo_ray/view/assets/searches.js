// What the searches of a tree found, and how: each probe halves the steps that can be critical.

// [lo, hi] before each probe and what the probe showed, replayed by the rule of the growth.
function replay(search, verifyFinal) {
  let [low, high] = [1, Math.max(1, search.length - (verifyFinal ? 0 : 1))];
  return search.probes.map((probe, i) => {
    const before = [low, high];
    const last = i === search.probes.length - 1;
    const undecided = !probe.successes && last && search.interval[1] !== probe.anchor;
    if (probe.successes) low = probe.anchor + 1;
    else if (!undecided) high = probe.anchor;
    return { ...probe, before, undecided };
  });
}

function stateOfProbe({ successes, undecided }) {
  if (successes) return "alive";
  return undecided ? "undecided" : "lost";
}

function verdict(search) {
  const { critical, confirmed, interval, length, step } = search;
  if (known(critical)) {
    return [h("b", {}, `Step ${step} of ${length}`), confirmed
      ? " is the first after which no completion succeeded." : " is named, but not confirmed."];
  }
  const [first, last] = interval;
  const where = first === last ? `step ${first}` : `steps ${first}–${last}`;
  return [h("b", {}, "Not confirmed. "), `The budget ended while ${where} of ${length} could still be the one.`];
}

function searchDiagram(search, algorithm) {
  const probes = replay(search, algorithm.verify_final);
  const cell = clamp(Math.floor(250 / search.length), 9, 34);
  const row = 21;
  const width = 12 + search.length * cell + 96;
  const x = (step) => 6 + (step - 1) * cell;
  const svg = s("svg", { class: "search", viewBox: `0 0 ${width} ${(probes.length + 1) * row + 4}`, width, role: "img",
    "aria-label": probes.map((p, i) => `probe ${i + 1} after step ${p.anchor}: ${p.successes} of ${p.attempts} succeeded`).join("; ") });
  const [first, last] = known(search.step) ? [search.step, search.step] : search.interval;
  for (let step = 1; step <= search.length; step++) {
    const state = step < first ? "alive" : step > last ? "lost" : known(search.step) ? "found" : "open";
    svg.append(s("rect", { class: `step ${state}`, x: x(step), y: 2, width: cell - 2, height: row - 5, rx: 3 }));
    if (cell >= 15 || step === search.step) {
      svg.append(s("text", { class: `step-text ${state}`, x: x(step) + cell / 2 - 1, y: 14, "text-anchor": "middle" }, step));
    }
  }
  probes.forEach((probe, i) => {
    const y = (i + 1) * row;
    const [low, high] = probe.before;
    const [from, to] = [x(low), x(high) + cell - 2];
    const at = x(probe.anchor) + cell - 2;
    const state = stateOfProbe(probe);
    svg.append(
      s("line", { class: "range", x1: from, x2: to, y1: y + 9, y2: y + 9 }),
      s("g", { class: `anchor ${state}` },
        s("circle", { cx: at, cy: y + 9, r: 7.5 }),
        s("text", { x: at, y: y + 12.4, "text-anchor": "middle" }, i + 1)),
      s("text", { class: "result", x: x(search.length) + cell + 8, y: y + 12.5 },
        `${probe.successes}/${probe.attempts} ${probe.undecided ? "undecided" : probe.successes ? "recovered" : "lost"}`));
  });
  return svg;
}

// The card above the details. `choose(i)` shows another search, `go(id)` selects a node.
function searchCard(tree, algorithm, current, choose, go) {
  const { searches } = tree;
  if (!searches.length) {
    const why = tree.spends && Object.values(tree.spends).some(({ kind }) => kind === "probe")
      ? "Its branches belong to no finished search." : "No failed trajectory of this tree was searched.";
    return h("section", { class: "card" }, h("p", { class: "note" }, why));
  }
  const search = searches[current];
  const picks = searches.map((one, i) =>
    button(known(one.step) ? `${i + 1} · step ${one.step}` : `${i + 1} · open`, () => choose(i),
      { "aria-pressed": String(i === current), title: `search of leaf ${tree.label(one.leaf)}` }));
  return h("section", { class: "card searches", "aria-label": "search for the critical step" },
    h("div", { class: "line" }, h("h3", {}, "Search"), searches.length > 1 && h("div", { class: "segments" }, picks)),
    h("p", {}, verdict(search)),
    searchDiagram(search, algorithm),
    h("p", { class: "line" },
      known(search.critical) && button("to the critical step", () => go(search.critical), { class: "quiet" }),
      button(`to the searched leaf`, () => go(search.leaf), { class: "quiet" })));
}
