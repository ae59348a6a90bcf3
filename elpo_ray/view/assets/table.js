// The table of trees: sorted, searched and filtered; only the rows in sight exist as elements.

const ROW_HEIGHT = 30;
const ROWS_BEYOND = 8;

const COLUMNS = [
  { key: "step", name: "step", long: "training step" },
  { key: "task", name: "input", long: "input and its prompt", text: true, wide: true },
  { key: "rate", name: "outcome", long: "leaves that succeeded, failed, have no verdict" },
  { key: "reward", name: "reward", long: "mean reward of the leaves" },
  { key: "critical", name: "critical", long: "first irrecoverable step / steps of its trajectory" },
  { key: "searches", name: "searches", long: "searches that named a step / searches" },
  { key: "spread", name: "A range", long: "largest less smallest advantage" },
  { key: "entropy", name: "entropy", long: "mean token entropy of the turns, nats" },
  { key: "steps", name: "nodes", long: "steps in the tree" },
  { key: "depth", name: "depth", long: "steps of the longest trajectory" },
  { key: "tokens", name: "tokens", long: "sampled tokens" },
  { key: "tool_faults", name: "faults", long: "tool calls that failed or were malformed" },
];

const FILTERS = [
  { name: "all", keep: () => true },
  { name: "mixed", keep: (row) => row.outcome === "mixed" },
  { name: "all succeeded", keep: (row) => row.outcome === "succeeded" },
  { name: "all failed", keep: (row) => row.outcome === "failed" },
  { name: "no verdict", keep: (row) => row.ungraded > 0 },
  { name: "critical step named", keep: (row) => row.confirmed > 0 },
  { name: "search unfinished", keep: (row) => row.confirmed < row.searches },
  { name: "tool faults", keep: (row) => row.tool_faults > 0 },
];

// What the user has asked for; it outlives the table, so that going back finds it as it was.
const asked = {
  filter: "all",
  step: null,
  search: "",
  texts: null,
  sort: "step",
  descending: true,
  active: 0,
  scroll: 0,
};

function order(rows, { sort, descending }) {
  const direction = descending ? -1 : 1;
  return rows.sort((a, b) => {
    const [x, y] = [a[sort], b[sort]];
    if (known(x) !== known(y)) return known(x) ? -1 : 1;
    if (known(x) && x !== y) return (x < y ? -1 : 1) * direction;
    return a.index - b.index;
  });
}

// Rows in the order shown; the tree page's "next" follows it too.
function chosen(rows) {
  const filter = FILTERS.find(({ name }) => name === asked.filter) ?? FILTERS[0];
  const words = asked.search.toLowerCase().split(/\s+/).filter(Boolean);
  const found = (row) =>
    words.every((word) => row.haystack.includes(word)) || asked.texts?.has(row.index);
  return order(
    rows.filter((row) =>
      filter.keep(row) && (asked.step === null || row.step === asked.step) && found(row)),
    asked,
  );
}

// Indices of the rows whose turns or responses contain `text`; every chunk is inflated once.
async function searchTexts(rows, text, progress) {
  const wanted = text.toLowerCase();
  const byChunk = new Map();
  for (const row of rows) {
    if (row.chunk) byChunk.set(row.chunk, [...(byChunk.get(row.chunk) ?? []), row]);
  }
  const found = new Set();
  let done = 0;
  for (const [id, members] of byChunk) {
    const chunk = await source.chunk(id);
    for (const row of members) {
      const { columns } = chunk.trees[row.place];
      const texts = [...(columns.text ?? []), ...(columns.observation ?? [])];
      if (texts.some((one) => one && one.toLowerCase().includes(wanted))) found.add(row.index);
    }
    progress(++done / byChunk.size);
  }
  return found;
}

function outcomeBar(row) {
  const part = (count, kind) =>
    count > 0 && h("i", { class: `bar-${kind}`, style: `flex:${count}` });
  return h("span", { class: "outcome" },
    h("span", { class: "bar", "aria-hidden": "true" },
      part(row.succeeded, "success"), part(row.failed, "failure"), part(row.ungraded, "ungraded")),
    h("span", { class: "count" }, `${row.succeeded}/${row.leaves - row.ungraded}`));
}

function cellOf(row, key) {
  switch (key) {
    case "step": return row.step;
    case "task": return [h("b", {}, row.task), row.prompt && h("span", { class: "muted" }, ` ${row.prompt}`)];
    case "rate": return outcomeBar(row);
    case "critical":
      return known(row.critical) ? `${row.critical}/${row.searched}` : h("span", { class: "muted" }, "–");
    case "searches":
      return row.searches ? `${row.confirmed}/${row.searches}` : h("span", { class: "muted" }, "–");
    case "reward": return signed(row.reward);
    case "entropy": case "spread": return brief(row[key]);
    default: return whole(row[key]);
  }
}

class TreeTable {
  constructor(rows, open) {
    this.all = rows;
    this.open = open;
    this.body = h("tbody");
    this.heads = new Map();
    this.scroller = h("div", {
      class: "scroller",
      tabindex: "0",
      role: "group",
      "aria-label": "trees; arrow keys choose, Enter opens",
      onscroll: () => this.draw(),
      onkeydown: (event) => this.key(event),
    }, h("table", {}, h("thead", {}, this.headings()), this.body));
    this.count = h("span", { class: "muted", role: "status" });
    this.element = h("section", { class: "trees" }, this.controls(), this.scroller);
    this.update();
  }

  headings() {
    return h("tr", {}, COLUMNS.map(({ key, name, long, text, wide }) => {
      const head = h("th", { scope: "col", class: [text && "text", wide && "wide", key === "rate" && "outcome-head"].filter(Boolean).join(" ") },
        button(name, () => this.sortBy(key), { title: `${long}; click to sort` }));
      this.heads.set(key, head);
      return head;
    }));
  }

  controls() {
    const shown = FILTERS.filter((filter) => filter.name === "all" || this.all.some(filter.keep));
    this.chips = shown.map((filter) => {
      const count = this.all.filter(filter.keep).length;
      const chip = button([filter.name, h("small", {}, whole(count))], () => {
        asked.filter = filter.name;
        this.update(true);
      }, { class: "chip" });
      chip.dataset.name = filter.name;
      return chip;
    });
    this.stepChip = button("", () => this.atStep(null), { class: "chip on", hidden: true });
    this.input = h("input", {
      type: "search",
      id: "search",
      placeholder: "search inputs; Enter searches every turn too",
      "aria-label": "search inputs; Enter searches the texts of every tree",
      value: asked.search,
      oninput: () => {
        asked.search = this.input.value;
        asked.texts = null;
        this.update(true);
      },
      onkeydown: (event) => {
        if (event.key === "Enter") this.deep();
        if (event.key === "ArrowDown") this.scroller.focus();
      },
    });
    return h("div", { class: "controls" },
      h("h2", {}, "Trees"), this.count,
      h("div", { class: "chips", role: "group", "aria-label": "filter by outcome" },
        this.chips, this.stepChip),
      this.input);
  }

  async deep() {
    const text = asked.search.trim();
    if (!text) return;
    asked.texts = await searchTexts(this.all, text, (share) => {
      this.count.textContent = `searching texts ${percent(share)}`;
    });
    if (asked.search.trim() === text) this.update(true);
  }

  sortBy(key) {
    const text = COLUMNS.find((column) => column.key === key).text;
    asked.descending = asked.sort === key ? !asked.descending : !text;
    asked.sort = key;
    this.update(true);
  }

  atStep(step) {
    asked.step = step;
    this.update(true);
  }

  update(fromTop = false) {
    this.rows = chosen(this.all);
    if (fromTop) {
      asked.active = 0;
      this.scroller.scrollTop = 0;
    }
    for (const chip of this.chips) {
      chip.setAttribute("aria-pressed", String(chip.dataset.name === asked.filter));
    }
    this.stepChip.hidden = asked.step === null;
    this.stepChip.replaceChildren(`step ${asked.step} ×`);
    for (const [key, head] of this.heads) {
      const sorted = asked.sort === key;
      head.classList.toggle("sorted", sorted);
      const way = asked.descending ? "descending" : "ascending";
      head.setAttribute("aria-sort", sorted ? way : "none");
    }
    const all = this.all.length;
    this.count.textContent = this.rows.length === all
      ? plural(all, "tree") : `${whole(this.rows.length)} of ${plural(all, "tree")}`;
    this.draw();
  }

  draw() {
    const { scrollTop, clientHeight } = this.scroller;
    const first = Math.max(0, Math.floor(scrollTop / ROW_HEIGHT) - ROWS_BEYOND);
    const last = Math.min(this.rows.length,
      Math.ceil((scrollTop + (clientHeight || 600)) / ROW_HEIGHT) + ROWS_BEYOND);
    if (this.rows.length) asked.scroll = scrollTop;
    const space = (rows) =>
      rows > 0 && h("tr", { class: "space", style: `height:${rows * ROW_HEIGHT}px` });
    this.body.replaceChildren(...[
      space(first),
      ...this.rows.slice(first, last).map((row, i) => this.line(row, first + i)),
      space(this.rows.length - last),
      !this.rows.length && h("tr", {}, h("td", { colspan: COLUMNS.length, class: "none" },
        this.all.length ? "no tree matches" : "this run has no trees")),
    ].filter(Boolean));
  }

  line(row, place) {
    const active = place === asked.active;
    return h("tr", {
      class: `row${active ? " active" : ""}${row.chunk ? "" : " absent"}`,
      onclick: () => {
        asked.active = place;
        this.open(row);
      },
    }, COLUMNS.map(({ key, text }) => h("td", { class: text ? "text" : "" },
      key === "task"
        ? h("a", { href: hrefOf(row), tabindex: "-1" }, cellOf(row, key)) : cellOf(row, key))));
  }

  key(event) {
    const page = Math.floor(this.scroller.clientHeight / ROW_HEIGHT) - 2;
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, j: 1, k: -1,
      Home: -Infinity, End: Infinity };
    if (event.key in moves) {
      asked.active = clamp(asked.active + moves[event.key], 0, Math.max(this.rows.length - 1, 0));
      const top = asked.active * ROW_HEIGHT;
      const { scrollTop, clientHeight } = this.scroller;
      const room = clientHeight - 2 * ROW_HEIGHT;
      if (top < scrollTop) this.scroller.scrollTop = top;
      else if (top > scrollTop + room) this.scroller.scrollTop = top - room;
      this.draw();
    } else if (event.key === "Enter" && this.rows[asked.active]) {
      this.open(this.rows[asked.active]);
    } else return;
    event.preventDefault();
  }
}

const hrefOf = (row) => `#/tree/${row.step}/${row.line}`;
