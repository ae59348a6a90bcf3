// Where nodes stand: a column a step, a row a leaf; a node in the row of its first child, so that
// the trajectory that was searched runs straight and its probes hang below.

const DENSITY = {
  roomy: { height: 36, row: 45 },
  dense: { height: 22, row: 27 },
};
const GAP = 34;
const WIDTH = { least: 84, most: 190 };
const PROMPT = 58;
const MARGIN = { left: 10, top: 24, bottom: 14, right: 30 };

function layoutOf(tree, room, density) {
  const { height, row } = DENSITY[density];
  const depth = Math.max(...tree.nodes.map((node) => node.depth));
  const free = (room - MARGIN.left - MARGIN.right - PROMPT - GAP) / depth - GAP;
  const width = clamp(Math.floor(free), WIDTH.least, WIDTH.most);
  const rows = new Array(tree.size).fill(0);
  let next = 0;
  const stack = [0];
  const leaves = [];
  while (stack.length) {
    const id = stack.pop();
    const { children } = tree.nodes[id];
    if (!children.length) {
      rows[id] = next++;
      leaves.push(id);
    }
    for (let i = children.length - 1; i >= 0; i--) stack.push(children[i]);
  }
  for (let id = tree.size - 1; id >= 0; id--) {
    const { children } = tree.nodes[id];
    if (children.length) rows[id] = rows[children[0]];
  }
  const box = (id) => {
    const { depth: at } = tree.nodes[id];
    const x = at === 0 ? MARGIN.left : MARGIN.left + PROMPT + GAP + (at - 1) * (width + GAP);
    const y = MARGIN.top + rows[id] * row;
    return { x, y, width: at === 0 ? PROMPT : width, height, middle: y + height / 2 };
  };
  return {
    box,
    rows,
    leaves,
    order: [...tree.nodes.keys()].sort((a, b) => rows[a] - rows[b] || a - b),
    width: MARGIN.left + PROMPT + GAP + depth * (width + GAP) - GAP + MARGIN.right,
    height: MARGIN.top + next * row + MARGIN.bottom,
  };
}

// The node one step away in a direction, or the same one.
function neighbour(tree, layout, id, key) {
  const node = tree.nodes[id];
  if (key === "ArrowLeft") return node.parent ?? id;
  if (key === "ArrowRight") return node.children[0] ?? id;
  const way = key === "ArrowDown" ? 1 : -1;
  const column = layout.order.filter((other) => tree.nodes[other].depth === node.depth);
  return column[column.indexOf(id) + way] ?? id;
}
