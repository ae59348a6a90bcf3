// Where the data comes from: this very page, or the server that it came from.

const LIVE = document.querySelector('meta[name="source"]')?.content === "live";
const KEPT_CHUNKS = 12;

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

function embedded(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`this page has no ${id}`);
  const text = element.textContent;
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

const source = {
  version: "",
  chunks: new Map(),

  // The run's overview; null if nothing is new since the last call.
  async overview() {
    if (!LIVE) return inflate(embedded("overview"));
    const answer = await fetch(`overview?known=${this.version}`);
    if (answer.status === 204) return null;
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    this.version = answer.headers.get("X-Version");
    return inflate(await answer.arrayBuffer());
  },

  async chunk(id) {
    if (!this.chunks.has(id)) {
      const bytes = LIVE ? await this.fetched(id) : embedded(`chunk-${id}`);
      this.chunks.set(id, inflate(bytes));
      if (this.chunks.size > KEPT_CHUNKS) this.chunks.delete(this.chunks.keys().next().value);
    }
    return this.chunks.get(id);
  },

  async fetched(id) {
    const answer = await fetch(`chunk/${id}`);
    if (!answer.ok) throw new Error(`the server answered ${answer.status}; reload the page`);
    return answer.arrayBuffer();
  },
};

function outcomeOf(row) {
  if (row.ungraded === row.leaves) return "ungraded";
  if (row.succeeded && row.failed) return "mixed";
  return row.succeeded ? "succeeded" : "failed";
}

// The table's columns as rows.
function rowsOf(table) {
  const keys = Object.keys(table);
  const count = keys.length && table.step ? table.step.length : 0;
  const rows = [];
  for (let i = 0; i < count; i++) {
    const row = { index: i };
    for (const key of keys) row[key] = table[key][i];
    row.outcome = outcomeOf(row);
    row.rate = row.leaves > row.ungraded ? row.succeeded / (row.leaves - row.ungraded) : null;
    row.haystack = `${row.task} ${row.prompt}`.toLowerCase();
    rows.push(row);
  }
  return rows;
}

// A tree's record with its structure worked out; node 0 is the prompt, parents come first.
function treeOf(record, vocabulary) {
  const { columns, size } = record;
  const value = (name, id) => columns[name]?.[id] ?? null;
  const nodes = [];
  for (let id = 0; id < size; id++) {
    const parent = value("parent", id);
    const node = { id, parent, children: [], leaves: [], depth: 0 };
    node.depth = parent === null ? 0 : nodes[parent].depth + 1;
    if (parent !== null) nodes[parent].children.push(id);
    nodes.push(node);
  }
  for (let id = size - 1; id >= 0; id--) {
    const node = nodes[id];
    if (!node.children.length) node.leaves = [id];
    else for (const child of node.children) node.leaves.push(...nodes[child].leaves);
  }
  const path = (id) => {
    const ids = [];
    for (let at = id; at > 0; at = nodes[at].parent) ids.unshift(at);
    return ids;
  };
  const label = (id) => value("label", id) ?? id;
  const tokenValue = (name, id, i) => {
    const hundredths = value(name, id)?.[i];
    return known(hundredths) ? hundredths / 100 : null;
  };
  return { ...record, nodes, value, tokenValue, path, label, vocabulary, has: (name) => name in columns };
}

async function loadTree(row) {
  const chunk = await source.chunk(row.chunk);
  return treeOf(chunk.trees[row.place], chunk.vocabulary);
}

// A call's arguments by name; text that is not JSON, because it was shortened, stays text.
function argumentsOf(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return { arguments: text };
  }
}

// Text and call of an assistant turn: the call that the dump names, else as far as the Hermes tags
// of its text tell.
function actionOf(tree, id) {
  const text = tree.value("text", id) ?? "";
  const given = tree.value("arguments", id);
  if (given !== null) return { said: text, call: { name: tree.value("tool", id) ?? "tool", arguments: argumentsOf(given) } };
  const open = text.indexOf("<tool_call>");
  if (open < 0) return { said: text, call: null };
  const body = text.slice(open + 11).split("</tool_call>")[0];
  try {
    const call = JSON.parse(body);
    if (call && typeof call.name === "string") {
      return { said: text.slice(0, open).trim(), call };
    }
  } catch {
    // a malformed call is shown as it is
  }
  return { said: text, call: null };
}

// One line that says what a step does: the line of code that is run, or the call.
function lineOf(tree, id) {
  const { said, call } = actionOf(tree, id);
  if (!call && (said.includes("<tool_call>") || tree.value("kind", id) === "malformed")) return "malformed";
  if (call) {
    const given = call.arguments ?? {};
    if (typeof given.code === "string") {
      const lines = given.code.split("\n").map((line) => line.trim());
      return flat(lines.find((line) => line && !line.startsWith("#")) ?? call.name);
    }
    const values = Object.values(given).map((value) => (typeof value === "string" ? value : JSON.stringify(value)));
    return flat(`${call.name}(${values.join(", ")})`);
  }
  const box = said.lastIndexOf("\\boxed{");
  return flat(box >= 0 ? said.slice(box) : said);
}
