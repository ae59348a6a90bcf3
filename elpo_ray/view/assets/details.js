// What one node holds: the step, its trajectory, its tokens.

const TABS = { step: "Step", path: "Trajectory", tokens: "Tokens" };

function block(title, text, kind = "") {
  return h("div", { class: `block ${kind}` }, h("div", { class: "block-title" }, title), h("pre", {}, text));
}

function actionBlocks(tree, id) {
  const { said, call } = actionOf(tree, id);
  const blocks = [];
  if (said) blocks.push(block(call ? "says" : "turn", said));
  if (call) {
    for (const [name, value] of Object.entries(call.arguments ?? {})) {
      const code = typeof value === "string" ? value : JSON.stringify(value, null, 1);
      blocks.push(block(`calls ${call.name}(${name})`, code, "call"));
    }
    if (!Object.keys(call.arguments ?? {}).length) blocks.push(block(`calls ${call.name}()`, "", "call"));
  }
  return blocks;
}

const RESTORED = {
  fresh: "own session",
  fork: "forked state",
  replay: "replayed prefix",
};

function responseBlock(tree, id) {
  const text = tree.value("observation", id);
  if (!known(text)) return null;
  const kind = tree.value("kind", id);
  const facts = [kind, known(tree.value("seconds", id)) && duration(tree.value("seconds", id)),
    RESTORED[tree.value("restored", id)]].filter(Boolean);
  const made = block(["responds", h("span", { class: "facts" }, facts.map((fact) => h("span", {}, fact)))],
    text, kind && kind !== "ok" ? "fault" : "response");
  made.append(...(tree.value("figures", id) ?? []).map((image, i) =>
    h("img", { class: "figure", alt: `figure ${i + 1}`, src: `data:image/png;base64,${image}` })));
  return made;
}

const ENDS = {
  answer: "ended with an answer",
  max_turns: "ended at its last allowed turn",
  turn_length: "ended by a turn over its token limit",
  context: "ended with the context window full",
  sandbox: "ended by a failure of the sandbox",
};

function leafLine(tree, id) {
  const outcome = tree.value("outcome", id);
  if (!outcome) return null;
  const spend = tree.spends[id];
  const origin = spend && (spend.kind === "root" ? "sampled from the prompt" : `sampled by a probe after step ${spend.anchor}`);
  return h("p", { class: "leaf-line" }, h("span", { class: `chip-${outcome}` }, `${SIGNS[outcome]} ${outcome}`),
    outcome === "ungraded" ? "" : ` reward ${signed(tree.value("reward", id))}`,
    h("span", { class: "muted" }, [" ", ENDS[tree.value("end", id)], origin].filter(Boolean).join(" · ")));
}

function valueBar(value, top) {
  const share = top ? clamp(Math.abs(value) / top, 0, 1) * 50 : 0;
  const side = value < 0 ? `right:50%;width:${share}%` : `left:50%;width:${share}%`;
  return h("span", { class: "value-bar" }, h("i", { class: value < 0 ? "bar-failure" : "bar-success", style: side }));
}

function creditTable(tree, id, algorithm) {
  if (!id || !tree.has("advantage")) return null;
  const level = ["a_branch", "a_traj", "advantage"];
  const top = Math.max(...level.flatMap((key) => tree.nodes.map((node) => Math.abs(tree.value(key, node.id) ?? 0))));
  const hierarchical = algorithm.credit === "hierarchical";
  const names = { r: "r", a_branch: "A branch", a_traj: "A trajectory", advantage: hierarchical ? "A hier" : "A" };
  const rewards = Math.max(...tree.nodes.map((node) => Math.abs(tree.value("r", node.id) ?? 0)));
  const line = (key) => h("tr", { class: key }, h("th", { scope: "row" }, names[key]),
    h("td", {}, signed(tree.value(key, id), 3)), h("td", {}, valueBar(tree.value(key, id) ?? 0, key === "r" ? rewards : top)));
  const { lam, eps_high: up, credit } = algorithm;
  const formula = hierarchical
    ? `A = ${lam} · A branch + ${Number((1 - lam).toFixed(3))} · A trajectory` : `by the rule ${credit}`;
  return [
    h("table", { class: "credit" }, h("tbody", {}, ["r", "a_branch", "a_traj", "advantage"].map(line))),
    h("p", { class: "muted small" }, formula,
      known(tree.value("clip_low", id)) && ` · ratio kept in [${Number(tree.value("clip_low", id).toFixed(4))}, ${Number((1 + up).toFixed(4))}]`,
      tree.value("elc", id) && h("b", {}, " · in the ELC region")),
  ];
}

function stepTab(tree, id, algorithm) {
  if (!id) {
    if (!tree.messages.length) return [h("p", { class: "note" }, "This dump does not hold the prompt's text.")];
    return tree.messages.map(({ role, content }) => block(role, content, role === "user" ? "response" : ""));
  }
  const text = tree.value("text", id);
  const facts = [
    known(tree.value("tokens", id)) && plural(tree.value("tokens", id), "token"),
    known(tree.value("entropy", id)) && `entropy ${brief(tree.value("entropy", id))} nats`,
    known(tree.value("version", id)) && `weights ${tree.value("version", id)}`,
    plural(tree.nodes[id].leaves.length, "leaf", "leaves") + " below",
  ].filter(Boolean);
  return [
    leafLine(tree, id),
    creditTable(tree, id, algorithm),
    known(text) ? actionBlocks(tree, id) : h("p", { class: "note" }, "This dump has no texts: only shapes, rewards and searches."),
    responseBlock(tree, id),
    h("p", { class: "facts" }, facts.map((fact) => h("span", {}, fact))),
  ];
}

// The whole trajectory through a node: down its first branch where there are several.
function through(tree, id) {
  let end = id;
  while (tree.nodes[end].children.length) end = tree.nodes[end].children[0];
  return tree.path(end);
}

function pathTab(tree, id, select, scale) {
  const path = through(tree, id);
  const items = path.map((one, i) => {
    const { fill: color, ink } = scale.of(one);
    const siblings = tree.nodes[tree.nodes[one].parent].children.length;
    return h("li", { class: one === id ? "here" : "" },
      h("div", { class: "line" },
        button(`step ${i + 1}`, () => select(one), { class: "quiet" }),
        h("span", { class: "value", style: `background:${color};color:${ink}` }, `A ${signed(tree.value("advantage", one))}`),
        siblings > 1 && h("span", { class: "muted small" }, `one of ${siblings} ways on`)),
      known(tree.value("text", one)) && actionBlocks(tree, one),
      responseBlock(tree, one),
      leafLine(tree, one));
  });
  return [h("ol", { class: "path" }, items)];
}

const TOKEN_MEASURES = {
  advantage: { name: "advantage", of: (tree, id) => tree.value("advantage", id) },
  entropy: { name: "entropy", of: (tree, id, i) => tree.tokenValue("entropies", id, i) },
  logprob: { name: "log-prob", of: (tree, id, i) => tree.tokenValue("logprobs", id, i) },
};

function tokenColor(tree, measure, value, scale) {
  if (!known(value)) return { fill: "transparent", ink: "inherit" };
  if (measure === "advantage") return scale.at(value);
  return mixed(stopsOf("sequential"), measure === "entropy" ? value / 2 : -value / 5);
}

function tokenSpan(tree, id, i, measure, scale) {
  const token = tree.value("ids", id)[i];
  const text = tree.vocabulary?.[token] ?? `⟨${token}⟩`;
  const { fill: color, ink } = tokenColor(tree, measure, TOKEN_MEASURES[measure].of(tree, id, i), scale);
  const title = [`token ${token}`, `advantage ${signed(tree.value("advantage", id), 3)}`,
    known(tree.tokenValue("entropies", id, i)) && `entropy ${tree.tokenValue("entropies", id, i)} nats`,
    known(tree.tokenValue("logprobs", id, i)) && `log-prob ${signed(tree.tokenValue("logprobs", id, i))} nats`,
    known(tree.value("clip_low", id)) && `ratio at least ${brief(tree.value("clip_low", id))}`].filter(Boolean).join("\n");
  return h("span", { class: "token", style: `background:${color};color:${ink}`, title },
    text.replace(/\n/g, "↵\n").replace(/^ | $/g, "·") || "∅");
}

function tokensTab(tree, id, select, scale, measure, choose) {
  const path = through(tree, id);
  const sampled = tree.has("ids");
  const measures = Object.keys(TOKEN_MEASURES).filter((key) => sampled || key === "advantage");
  const picks = h("div", { class: "segments", role: "group", "aria-label": "colour of tokens" }, measures.map((key) =>
    button(TOKEN_MEASURES[key].name, () => choose(key), { "aria-pressed": String(key === measure) })));
  const notes = ["Every sampled token of a step has the step's advantage; responses are never trained on."];
  if (!sampled) notes.push("This dump has no token ids: whole turns are coloured.");
  else if (!Object.keys(tree.vocabulary ?? {}).length) notes.push("This run kept no tokenizer.json: ids are shown.");
  const parts = path.map((one, i) => {
    const ids = tree.value("ids", one);
    const text = tree.value("text", one);
    const { fill: color, ink } = scale.of(one);
    const turn = ids ? ids.map((_, k) => tokenSpan(tree, one, k, measure, scale))
      : known(text) && h("span", { class: "token", style: `background:${color};color:${ink}` }, text);
    const rest = ids && tree.value("tokens", one) > ids.length
      ? h("span", { class: "muted" }, ` … ${plural(tree.value("tokens", one) - ids.length, "token")} more`) : null;
    return h("div", { class: `turn${one === id ? " here" : ""}` },
      h("div", { class: "line" }, button(`step ${i + 1}`, () => select(one), { class: "quiet" }),
        h("span", { class: "muted small" }, valuesLine(tree, one, ["advantage", "r", "entropy"]))),
      h("div", { class: "tokens" }, turn, rest),
      known(tree.value("observation", one)) && h("div", { class: "tokens observed" }, tree.value("observation", one)));
  });
  return [picks, h("p", { class: "muted small" }, notes.join(" ")), parts];
}
