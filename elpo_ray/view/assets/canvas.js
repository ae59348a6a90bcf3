// The drawn tree: nodes, edges and, of one search, its path, anchors and interval.

const CHARACTER = 6.35;
const TURN = 26;
const CORNER = 5;

class Canvas {
  constructor(tree, { select, verifyFinal }) {
    this.tree = tree;
    this.verifyFinal = verifyFinal;
    this.select = select;
    this.element = h("div", { class: "canvas", role: "tree", "aria-label": "rollout tree" });
    this.nodes = [];
    this.edges = [];
  }

  // `view`: {measure, density, search, selected, dimmed(id)}
  draw(view) {
    const { tree } = this;
    const room = this.element.clientWidth || 860;
    this.layout = layoutOf(tree, room, view.density);
    this.scale = scaleOf(tree, view.measure);
    const { width, height } = this.layout;
    this.fits = Math.floor((this.layout.box(1).width - 11) / CHARACTER);
    this.names = this.labels(this.fits);
    const edges = s("g", { class: "edges" });
    const nodes = s("g", {});
    const search = tree.searches[view.search];
    const onPath = new Set(search ? tree.path(search.leaf) : []);
    this.nodes = tree.nodes.map(({ id }) => this.node(id, view));
    this.edges = tree.nodes.map(({ id, parent }) =>
      parent === null ? null : this.edge(id, onPath.has(id)));
    edges.append(...this.edges.filter(Boolean).sort((a, b) =>
      a.classList.contains("searched") - b.classList.contains("searched")));
    nodes.append(...this.nodes);
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}` },
      hatch(), this.steps(), edges, nodes, search && this.overlay(search));
    this.element.replaceChildren(svg);
    this.dim(view.dimmed);
    this.mark(view.selected);
  }

  steps() {
    const { tree, layout } = this;
    const depth = Math.max(...tree.nodes.map((node) => node.depth));
    const sample = (at) => tree.nodes.find((node) => node.depth === at).id;
    return s("g", { class: "steps" }, [...Array(depth).keys()].map((i) => {
      const { x, width } = layout.box(sample(i + 1));
      return s("text", { x: x + width / 2, y: 12, "text-anchor": "middle" }, i ? i + 1 : "step 1");
    }));
  }

  node(id, view) {
    const { tree } = this;
    const { x, y, width, height, middle } = this.layout.box(id);
    const { fill: color, ink } = this.scale.of(id);
    const outcome = tree.value("outcome", id);
    const roomy = view.density === "roomy";
    const line = id ? lineOf(tree, id) || this.names[id] : "prompt";
    const fits = this.fits - (outcome ? 1 : 0);
    const group = s("g", {
      class: `node${outcome ? " leaf" : ""}${id ? "" : " prompt"}`,
      role: "treeitem",
      "aria-label": this.spoken(id, line, view.measure),
      "aria-level": tree.nodes[id].depth + 1,
      onclick: () => this.select(id),
    });
    group.append(
      s("title", {}, `${line}\n${valuesLine(tree, id)}`),
      s("rect", { class: "box", x, y, width, height, rx: CORNER, style: `fill:${color}` }),
      s("text", { class: "label", x: x + 7, y: roomy && id ? y + 15 : middle + 4, style: `fill:${ink}` },
        cut(this.names[id], fits)),
    );
    if (roomy && id) group.append(this.second(id, view.measure, ink));
    if (tree.value("elc", id)) {
      group.append(s("rect", { class: "elc", x: x + 1, y: y + height - 5, width: width - 2, height: 5 }));
    }
    if (this.criticals().has(id)) group.append(...criticalMark(x, y, width, height));
    if (outcome) group.append(sign(outcome, x + width, middle));
    return group;
  }

  // Lines without needless space; if some do not fit, without the call that most steps begin with.
  labels(fits) {
    const { tree } = this;
    const lines = tree.nodes.map(({ id }) =>
      (id ? lineOf(tree, id) || `node ${tree.label(id)}` : "prompt"));
    const tight = lines.map((line) => (line.length > fits ? line.replace(/([,(]) +/g, "$1") : line));
    const heads = new Map();
    for (const line of tight) {
      const head = /^\w+(?=\()/.exec(line)?.[0];
      if (head) heads.set(head, (heads.get(head) ?? 0) + 1);
    }
    const [head, count] = [...heads].sort((a, b) => b[1] - a[1])[0] ?? ["", 0];
    if (count < lines.length / 2 || tight.every((line) => line.length <= fits)) return tight;
    return tight.map((line) => (line.startsWith(`${head}(`) ? line.slice(head.length) : line));
  }

  second(id, measure, ink) {
    const { tree } = this;
    const { x, y, width } = this.layout.box(id);
    const { name, sign: withSign } = MEASURES[measure];
    const value = tree.value(measure, id);
    const kind = tree.value("kind", id);
    const text = known(value) ? `${name} ${withSign ? signed(value) : brief(value)}` : "";
    return s("g", { class: "second", style: `fill:${ink}` },
      s("text", { x: x + 7, y: y + 28 }, text),
      kind && kind !== "ok" && s("text", { class: "fault", x: x + width - 10, y: y + 28, "text-anchor": "end" },
        width < 130 ? "!" : `! ${kind}`));
  }

  criticals() {
    this.marked ??= new Set(this.tree.searches.map(({ critical }) => critical).filter(known));
    return this.marked;
  }

  edge(id, searched) {
    const from = this.layout.box(this.tree.nodes[id].parent);
    const to = this.layout.box(id);
    const [x0, turn] = [from.x + from.width, from.x + from.width + TURN];
    const bend = Math.min(CORNER, Math.abs(to.middle - from.middle) / 2);
    const d = from.middle === to.middle
      ? `M${x0} ${from.middle}H${to.x}`
      : `M${x0} ${from.middle}H${turn - bend}q${bend} 0 ${bend} ${bend}` +
        `V${to.middle - bend}q0 ${bend} ${bend} ${bend}H${to.x}`;
    return s("path", { class: searched ? "edge searched" : "edge", d });
  }

  // Anchors of a search in the order of their probes; the interval if no step was named.
  overlay(search) {
    const path = this.tree.path(search.leaf);
    const group = s("g", { class: "overlay" });
    if (!known(search.critical)) {
      const [first, last] = search.interval;
      for (const id of path.slice(first - 1, last)) {
        const { x, y, width, height } = this.layout.box(id);
        group.append(s("rect", { class: "interval", x: x - 3, y: y - 3, width: width + 6, height: height + 6, rx: 7 }));
      }
    }
    const anchors = new Map();
    replay(search, this.verifyFinal).forEach((probe, i) =>
      anchors.set(probe.anchor, [...(anchors.get(probe.anchor) ?? []), { ...probe, order: i + 1 }]));
    for (const [anchor, probes] of anchors) {
      const { x, width, middle } = this.layout.box(path[anchor - 1]);
      const attempts = sum(probes.map((probe) => probe.attempts));
      const successes = sum(probes.map((probe) => probe.successes));
      const at = x + width + 14;
      group.append(s("g", { class: `anchor ${stateOfProbe({ successes, undecided: probes.some((one) => one.undecided) })}` },
        s("title", {}, `probe ${probes.map((one) => one.order).join(", ")}: after step ${anchor}, ${successes} of ${attempts} completions succeeded`),
        s("circle", { cx: at, cy: middle, r: 8.5 }),
        s("text", { x: at, y: middle + 3.6, "text-anchor": "middle" }, probes.map((one) => one.order).join(",")),
        s("text", { class: "tally", x: at, y: middle - 11.5, "text-anchor": "middle" }, `${successes}/${attempts}`)));
    }
    return group;
  }

  spoken(id, line, measure) {
    if (!id) return "prompt";
    const { tree } = this;
    const parts = [`step ${tree.nodes[id].depth}`, line];
    if (known(tree.value(measure, id))) parts.push(`${MEASURES[measure].long} ${signed(tree.value(measure, id))}`);
    if (this.criticals().has(id)) parts.push("critical step");
    if (tree.value("outcome", id)) parts.push(tree.value("outcome", id));
    return parts.join(", ");
  }

  dim(dimmed) {
    this.nodes.forEach((group, id) => {
      const pale = dimmed(id);
      group.classList.toggle("dim", pale);
      this.edges[id]?.classList.toggle("dim", pale);
    });
  }

  mark(id) {
    this.nodes.forEach((group, other) => {
      group.classList.toggle("selected", other === id);
      group.setAttribute("aria-selected", String(other === id));
    });
    this.ring?.remove();
    const { x, y, width, height } = this.layout.box(id);
    this.ring = s("rect", { class: "ring", x: x - 4.5, y: y - 4.5, width: width + 9, height: height + 9, rx: 8 });
    this.nodes[id].prepend(this.ring);
    const { element } = this;
    const margin = 40;
    if (x < element.scrollLeft + margin) element.scrollLeft = x - margin;
    else if (x + width > element.scrollLeft + element.clientWidth - margin) {
      element.scrollLeft = x + width - element.clientWidth + margin;
    }
    if (y < element.scrollTop + margin) element.scrollTop = y - margin;
    else if (y + height > element.scrollTop + element.clientHeight - margin) {
      element.scrollTop = y + height - element.clientHeight + margin;
    }
  }
}

function hatch() {
  return s("defs", {}, s("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    s("rect", { class: "hatch-ground", width: 6, height: 6 }),
    s("rect", { class: "hatch-line", width: 3, height: 6 })));
}

function criticalMark(x, y, width, height) {
  return [
    s("rect", { class: "critical", x: x - 1.5, y: y - 1.5, width: width + 3, height: height + 3, rx: CORNER + 1.5 }),
    s("rect", { class: "tag", x: x - 2.5, y: y - 11, width: 46, height: 12.5, rx: 3 }),
    s("text", { class: "tag-text", x: x + 20.5, y: y - 1.6, "text-anchor": "middle" }, "critical"),
  ];
}

function sign(outcome, x, y) {
  return s("g", { class: `sign ${outcome}` },
    s("circle", { cx: x, cy: y, r: 8 }),
    s("text", { x, y: y + 4, "text-anchor": "middle" }, SIGNS[outcome]));
}

function valuesLine(tree, id, keys = Object.keys(MEASURES)) {
  const shown = keys.map((key) => [key, MEASURES[key]]).filter(([key]) => known(tree.value(key, id)));
  return shown.map(([key, { name, sign: withSign }]) => {
    const value = tree.value(key, id);
    return `${name} ${withSign ? signed(value, 3) : brief(value)}`;
  }).join(" · ");
}
