// What the searches of a tree found, and how: each probe of a binary search halves the steps that can
// be critical; each probe of a search by evidence moves how likely every step is the critical one.

// [lo, hi] before each probe and what the probe showed, replayed by the rule of the growth.
function replay(search, verifyFinal) {
  if (search.posterior) return search.probes.map((probe) => ({ ...probe, undecided: !probe.attempts }));
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
  const { critical, confirmed, interval, length, step, posterior } = search;
  if (posterior) return posteriorVerdict(search);
  if (known(critical)) {
    return [h("b", {}, `Step ${step} of ${length}`), confirmed
      ? " is the first after which no completion succeeded." : " is named, but not confirmed."];
  }
  const [first, last] = interval;
  const where = first === last ? `step ${first}` : `steps ${first}–${last}`;
  return [h("b", {}, "Not confirmed. "), `The budget ended while ${where} of ${length} could still be the one.`];
}

function posteriorVerdict({ critical, interval, length, step, posterior }) {
  const last = posterior.trail.at(-1);
  if (known(critical)) {
    return [h("b", {}, `Step ${step} of ${length}`), ` is the first irrecoverable one with probability ${percent(last[step - 1])}.`];
  }
  const [first, end] = interval;
  const where = first === end ? `step ${first}` : `steps ${first}–${end}`;
  const mass = last.slice(first - 1, end).reduce((total, p) => total + p, 0);
  return [h("b", {}, "No step named. "), `The critical one is in ${where} of ${length} with probability ${percent(mass)}.`];
}

// One row of bars for the prior, one for what the tree knew already, and one after each probe.
function posteriorDiagram(search) {
  const { posterior, probes, length } = search;
  const cell = clamp(Math.floor(220 / length), 9, 34);
  const [row, top] = [34, 18];
  const rows = [
    { bars: posterior.prior, text: "prior" },
    { bars: posterior.trail[0], text: freeText(posterior.free) },
    ...probes.map((probe, i) => ({ bars: posterior.trail[i + 1], probe, order: i + 1,
      text: probe.attempts ? (probe.successes ? "succeeded" : "failed") : "no verdict" }))];
  const width = 12 + length * cell + 126;
  const height = top + rows.length * row + 4;
  const x = (step) => 6 + (step - 1) * cell;
  const spoken = rows.map(({ bars, text, probe }) =>
    `${probe ? `after step ${probe.anchor} ` : ""}${text}: ${bars.map(percent).join(" ")}`).join("; ");
  const svg = s("svg", { class: "search", viewBox: `0 0 ${width} ${height}`, width, role: "img", "aria-label": spoken });
  for (let step = 1; step <= length; step++) {
    if (cell >= 15 || step === search.step) {
      svg.append(s("text", { class: "step-text", x: x(step) + cell / 2 - 1, y: 12, "text-anchor": "middle" }, step));
    }
  }
  rows.forEach(({ bars, text, probe, order }, i) => {
    const base = top + (i + 1) * row - 6;
    svg.append(s("line", { class: "base", x1: x(1), x2: x(length) + cell - 2, y1: base, y2: base }));
    bars.forEach((p, place) => {
      const tall = Math.max(p > 0 ? 1 : 0, p * (row - 10));
      const found = place + 1 === search.step && i === rows.length - 1;
      svg.append(s("rect", { class: `belief${found ? " found" : ""}${i ? "" : " prior"}`, x: x(place + 1), y: base - tall, width: cell - 2, height: tall },
        s("title", {}, `step ${place + 1}: ${percent(p)}`)));
    });
    if (probe) {
      const at = x(probe.anchor) + cell - 1;
      svg.append(s("g", { class: `anchor ${stateOfProbe({ ...probe, undecided: !probe.attempts })}` },
        s("circle", { cx: at, cy: base, r: 6.5 }),
        s("text", { x: at, y: base + 3.4, "text-anchor": "middle" }, order)));
    }
    svg.append(s("text", { class: "result", x: x(length) + cell + 8, y: base - 3 }, text));
  });
  return svg;
}

// How many trajectories of the tree went through prefixes of the searched one.
function freeText(free) {
  if (!free.length) return "nothing in the tree";
  const [attempts, successes] = ["attempts", "successes"].map((key) => Math.max(...free.map((one) => one[key])));
  return `tree: ${successes}/${attempts} alike`;
}

function searchDiagram(search, algorithm) {
  if (search.posterior) return posteriorDiagram(search);
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
