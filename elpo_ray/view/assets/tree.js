// The tree page: one input's tree, its search and the chosen node, with mouse or keys.

const wanted = { measure: "advantage", density: null, tab: "step", tokens: "advantage", search: "", outcome: "all" };
const OUTCOMES = { all: "all leaves", success: "✓", failure: "✗", ungraded: "?" };

class TreePage {
  constructor(overview, row, tree, moves) {
    this.overview = overview;
    this.row = row;
    this.tree = tree;
    this.moves = moves;
    this.search = 0;
    const first = tree.searches[0];
    this.selected = first?.critical ?? first?.leaf ?? Math.min(1, tree.size - 1);
    this.canvas = new Canvas(tree, {
      select: (id) => this.select(id),
      verifyFinal: overview.algorithm.verify_final,
    });
    this.card = h("div");
    this.tabs = h("div", { class: "tabs", role: "tablist" });
    this.body = h("div", { class: "details-body", role: "tabpanel", tabindex: "0" });
    this.legend = h("span");
    this.found = h("span", { class: "muted small", role: "status" });
    this.element = h("main", { class: "tree" }, this.head(), this.toolbar(),
      h("div", { class: "columns" }, this.canvas.element,
        h("aside", { class: "details", "aria-label": "chosen step" }, this.card, this.tabs, this.body)));
  }

  get density() {
    return wanted.density ?? (this.row.leaves > 24 ? "dense" : "roomy");
  }

  head() {
    const { row, moves, tree } = this;
    const prompt = tree.messages.filter((message) => message.role === "user").at(-1)?.content ?? row.prompt;
    const go = (way, label, key) => button(label, () => moves[way](), { disabled: !moves[way], title: `${way} tree (${key})` });
    return h("header", { class: "head" },
      h("a", { href: "#/", class: "back", title: "back to the run (Esc)" }, "← ", this.overview.name),
      h("h1", {}, row.task), h("span", { class: "facts" }, h("span", {}, `step ${row.step}`),
        h("span", {}, `${row.leaves} of ${tree.budget} rollouts`),
        tree.lost > 0 && h("span", {}, `${plural(tree.lost, "attempt")} lost to infrastructure`)),
      outcomeBar(row),
      h("span", { class: "prompt-line", title: prompt }, flat(prompt ?? "")),
      h("span", { class: "pager" }, go("previous", "‹", "["), h("span", { class: "muted" }, moves.place), go("next", "›", "]")),
      tools());
  }

  toolbar() {
    const measures = Object.keys(MEASURES).filter((key) => this.tree.has(key));
    if (!measures.includes(wanted.measure)) wanted.measure = measures[0] ?? "advantage";
    this.colors = measures.map((key) => {
      const [letter, below] = MEASURES[key].name.split("_");
      const pick = button([letter, below && h("sub", {}, below)], () => this.color(key), { title: MEASURES[key].long });
      pick.dataset.key = key;
      return pick;
    });
    const outcomes = Object.keys(OUTCOMES).filter((key) => key === "all" || this.tree.nodes.some(({ id }) => this.tree.value("outcome", id) === key));
    this.outcomes = outcomes.map((key) => {
      const pick = button(OUTCOMES[key], () => this.only(key), { title: key === "all" ? "every leaf" : `only ${key}` });
      pick.dataset.key = key;
      return pick;
    });
    this.input = h("input", { type: "search", placeholder: "search steps", "aria-label": "search steps", value: wanted.search,
      oninput: () => {
        wanted.search = this.input.value;
        this.filter();
      },
      onkeydown: (event) => {
        if (event.key === "Enter") this.nextFound();
      } });
    return h("div", { class: "toolbar" },
      measures.length > 0 && h("span", { class: "line" }, h("span", { class: "muted small" }, "colour"),
        h("div", { class: "segments", role: "group", "aria-label": "colour by" }, this.colors), this.legend),
      h("div", { class: "segments", role: "group", "aria-label": "filter by outcome" }, this.outcomes),
      this.input, this.found,
      h("span", { class: "marks" },
        h("span", {}, h("i", { class: "mark-critical" }), "critical step"),
        h("span", {}, h("i", { class: "mark-elc" }), "ELC region"),
        h("span", {}, h("i", { class: "mark-anchor" }, "1"), "probe")));
  }

  shown() {
    this.redraw();
    this.observer ??= new ResizeObserver(() => {
      const { clientWidth } = this.canvas.element;
      if (clientWidth !== this.room) this.redraw();
    });
    this.observer.observe(this.canvas.element);
  }

  redraw() {
    this.room = this.canvas.element.clientWidth;
    this.canvas.draw({ measure: wanted.measure, density: this.density, search: this.search, selected: this.selected, dimmed: (id) => this.dimmed(id) });
    this.legend.replaceChildren(this.canvas.scale.empty ? "" : legend(this.canvas.scale, wanted.measure));
    for (const one of this.colors) one.setAttribute("aria-pressed", String(one.dataset.key === wanted.measure));
    this.filter();
    this.panel();
  }

  panel() {
    const { tree, overview } = this;
    const select = (id) => this.select(id);
    this.card.replaceChildren(searchCard(tree, overview.algorithm, this.search, (i) => this.choose(i), select));
    const node = tree.nodes[this.selected];
    const title = this.selected ? `Step ${node.depth}` : "Prompt";
    const labels = { ...TABS, step: title };
    this.tabs.replaceChildren(...Object.entries(labels).map(([key, label]) =>
      button(label, () => this.tab(key), { role: "tab", "aria-selected": String(key === wanted.tab) })),
    h("span", { class: "muted small" }, this.selected ? `node ${tree.label(this.selected)}` : ""));
    const scale = this.canvas.scale;
    const credit = tree.has("advantage") ? scaleOf(tree, "advantage") : scale;
    const parts = wanted.tab === "step" ? stepTab(tree, this.selected, overview.algorithm)
      : wanted.tab === "path" ? pathTab(tree, this.selected, select, credit)
        : tokensTab(tree, this.selected, select, credit, wanted.tokens, (key) => {
          wanted.tokens = key;
          this.panel();
        });
    this.body.replaceChildren(...parts.flat(Infinity).filter(Boolean));
    const here = this.body.querySelector(".here");
    const first = !here?.previousElementSibling?.matches(".turn, li");
    this.body.scrollTop = first ? 0 : here.offsetTop - this.body.offsetTop - 60;
  }

  select(id) {
    this.selected = id;
    this.canvas.mark(id);
    this.panel();
  }

  choose(search) {
    this.search = search;
    const { critical, leaf } = this.tree.searches[search];
    this.selected = critical ?? leaf;
    this.redraw();
  }

  color(measure) {
    wanted.measure = measure;
    this.redraw();
  }

  tab(key) {
    wanted.tab = key;
    this.panel();
  }

  only(outcome) {
    wanted.outcome = outcome;
    this.filter();
  }

  matches(id) {
    const text = `${this.tree.value("text", id) ?? ""}\n${this.tree.value("observation", id) ?? ""}\n${this.tree.value("kind", id) ?? ""}`;
    return text.toLowerCase().includes(wanted.search.toLowerCase());
  }

  dimmed(id) {
    const { tree } = this;
    const { outcome, search } = wanted;
    const kept = outcome === "all" || !this.outcomes.some((one) => one.dataset.key === outcome)
      || tree.nodes[id].leaves.some((leaf) => tree.value("outcome", leaf) === outcome);
    return !kept || (Boolean(search) && (!id || !this.matches(id)));
  }

  filter() {
    this.canvas.dim((id) => this.dimmed(id));
    for (const one of this.outcomes) one.setAttribute("aria-pressed", String(one.dataset.key === wanted.outcome));
    const hits = wanted.search ? this.tree.nodes.filter(({ id }) => id && !this.dimmed(id)).length : null;
    this.found.textContent = hits === null ? "" : plural(hits, "step");
  }

  nextFound() {
    const hits = this.canvas.layout.order.filter((id) => id && !this.dimmed(id));
    if (!hits.length) return;
    this.select(hits[(hits.indexOf(this.selected) + 1) % hits.length]);
  }

  key(event) {
    const { key } = event;
    const measures = this.colors.map((one) => one.dataset.key);
    if (key.startsWith("Arrow")) this.select(neighbour(this.tree, this.canvas.layout, this.selected, key));
    else if (key === "[" || key === "p") this.moves.previous?.();
    else if (key === "]" || key === "n") this.moves.next?.();
    else if (key === "Escape" || key === "Backspace") location.hash = "#/";
    else if (key === "/") this.input.focus();
    else if (key === "c") this.critical();
    else if (key === "s" && this.tree.searches.length) this.choose((this.search + 1) % this.tree.searches.length);
    else if (key === "t") this.tab(Object.keys(TABS)[(Object.keys(TABS).indexOf(wanted.tab) + 1) % 3]);
    else if (key === "z") this.zoom();
    else if (key === "f") {
      const keys = this.outcomes.map((one) => one.dataset.key);
      this.only(keys[(keys.indexOf(wanted.outcome) + 1) % keys.length]);
    } else if (measures[Number(key) - 1]) this.color(measures[Number(key) - 1]);
    else return false;
    return true;
  }

  critical() {
    const { critical } = this.tree.searches[this.search] ?? {};
    if (known(critical)) this.select(critical);
  }

  zoom() {
    wanted.density = this.density === "roomy" ? "dense" : "roomy";
    this.redraw();
  }
}
