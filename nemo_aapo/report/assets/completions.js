// The browser of completions and the history of prompts. Completions are hostile: they are only ever text.

// What has no look of its own, or changes the look of what is around it, is named: controls, bidi marks, half surrogates.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|\p{Surrogate}/gu;

function visible(text) {
  return text.replace(INVISIBLE, (c) => `⟦U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟧`);
}

// Every kept completion as an object, with its group.
const COMPLETIONS = DATA.runs.flatMap((run, r) => run.groups.flatMap((group) => {
  const members = group.completions.map((c, sample) => ({
    run: r, group, sample, text: c[0], reward: c[1], own: c[2], margin: c[3], advantage: c[4], tokens: c[5], finish: c[6],
    failed: c[7], parts: c[8], figures: c[9],
  }));
  group.members = members;
  return members;
}));
const SHOWN_AT_ONCE = 12;
const filter = { run: "", step: "", sort: "step", search: "", only: "", tint: "none", count: SHOWN_AT_ONCE };

const SORTS = {
  step: ["newest step", (c) => -c.group.step],
  high: ["highest reward", (c) => -(c.reward ?? -Infinity)],
  low: ["lowest reward", (c) => c.reward ?? Infinity],
  up: ["highest A*", (c) => -(c.advantage ?? -Infinity)],
  down: ["lowest A*", (c) => c.advantage ?? Infinity],
  long: ["longest", (c) => -(c.tokens ?? 0)],
};
const ONLY = {
  "": ["all", () => true],
  cut: ["cut at the limit", (c) => c.finish === "length"],
  failed: ["scoring failed", (c) => c.failed],
  right: ["reward at least 1", (c) => c.reward !== null && c.reward >= 1],
  wrong: ["reward below 1", (c) => c.reward !== null && c.reward < 1],
  up: ["pushed up (A* > 0)", (c) => c.advantage > 0],
  down: ["pushed down (A* < 0)", (c) => c.advantage < 0],
};
const TINTS = {
  none: "plain",
  logprob: "log-prob",
  difference: "learner − engine",
  entropy: "entropy",
};

function found() {
  const wanted = filter.search.toLowerCase(), only = ONLY[filter.only][1], key = SORTS[filter.sort][1];
  const hits = COMPLETIONS.filter((c) => only(c) &&
    (filter.run === "" || c.run === Number(filter.run)) &&
    (filter.step === "" || c.group.step === Number(filter.step)) &&
    (!wanted || c.text.toLowerCase().includes(wanted) || c.group.prompt.toLowerCase().includes(wanted)));
  return hits.map((c, i) => [key(c), i, c]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, , c]) => c);
}

// The text of a completion, token by token where figures of tokens were kept and are asked for.
function textOf(completion) {
  const box = el("pre", { className: "text" });
  if (filter.tint === "none" || !completion.figures) {
    box.textContent = visible(completion.text) || "(empty)";
    return box;
  }
  const [lengths, logprobs, differences, entropies] = completion.figures;
  const letters = Array.from(completion.text);
  const strongest = Math.max(100, ...differences.map(Math.abs));
  let place = 0;
  lengths.forEach((length, i) => {
    const piece = letters.slice(place, place + length).join("");
    place += length;
    const span = el("span", {}, visible(piece) || "·");
    const by = { logprob: [-logprobs[i] / 500, "230,120,20"], entropy: [entropies[i] / 300, "130,80,220"],
      difference: [Math.abs(differences[i]) / strongest, differences[i] > 0 ? "210,50,60" : "30,110,220"] }[filter.tint];
    span.style.backgroundColor = `rgba(${by[1]},${Math.min(0.75, by[0]).toFixed(2)})`;
    span.title = `log-prob ${(logprobs[i] / 100).toFixed(2)} (p ${Math.exp(logprobs[i] / 100).toFixed(3)}), ` +
      `learner − engine ${(differences[i] / 10000).toFixed(4)}, entropy ${(entropies[i] / 100).toFixed(2)}`;
    box.append(span);
  });
  return box;
}

function badge(text, kind) {
  return el("span", { className: `badge ${kind || ""}` }, text);
}

function facts(c) {
  const kind = c.failed ? "bad" : c.reward >= 1 ? "good" : "plain";
  const parts = c.parts && Object.keys(c.parts).length > 1
    ? Object.entries(c.parts).map(([name, value]) => badge(`${visible(name)} ${shown(value)}`)) : [];
  return el("div", { className: "facts" },
    badge(c.failed ? "scoring failed" : `reward ${shown(c.reward)}`, kind), ...parts,
    badge(`A* ${shown(c.advantage)}`, c.advantage > 0 ? "up" : c.advantage < 0 ? "down" : ""),
    badge(`A ${shown(c.own)}`), badge(`δ ${shown(c.margin)}`), badge(`${shown(c.tokens)} tokens`),
    c.finish === "length" ? badge("cut", "bad") : null);
}

function whereFrom(c) {
  const { group } = c;
  return [MANY ? visible(DATA.runs[c.run].name) : null, `step ${group.step}`, `group ${group.index}`, `completion ${c.sample + 1} of ${group.members.length}`]
    .filter(Boolean).join(" · ");
}

function completionCard(c) {
  const group = el("div", { className: "side", hidden: true });
  const open = el("button", { type: "button", className: "quiet-button", "aria-expanded": "false", click: () => {
    group.hidden = !group.hidden;
    open.setAttribute("aria-expanded", String(!group.hidden));
    open.closest("article").classList.toggle("whole", !group.hidden);
    open.textContent = group.hidden ? "whole group" : "close group";
    if (!group.hidden) group.replaceChildren(...c.group.members.map((m) => el("div", { className: m === c ? "member this" : "member" }, facts(m), textOf(m))));
  } }, "whole group");
  return el("article", { className: "completion" },
    el("div", { className: "row" }, facts(c), open),
    el("p", { className: "muted" }, whereFrom(c)),
    el("details", { className: "prompt" }, el("summary", {}, visible(c.group.prompt.replace(/\s+/g, " ").slice(0, 160))),
      el("pre", { className: "text" }, visible(c.group.prompt)),
      el("p", { className: "muted" }, `answer ${visible(c.group.answer)} · ${visible(c.group.source)} · sampled by version ${c.group.version} · reference rewards ` +
        `${c.group.references.length ? c.group.references.map((r) => shown(r)).join(", ") : "none"}${c.group.time ? ` · ${visible(c.group.time)}` : ""}`)),
    textOf(c), group);
}

function choice(label, options, value, set) {
  return el("label", {}, label, el("select", { change: (event) => set(event.target.value) },
    ...options.map(([key, text]) => el("option", { value: key, selected: key === value }, text))));
}

function completionsSection() {
  if (!COMPLETIONS.length) return el("p", { className: "muted" }, "No rollouts of training steps are kept (rollout.keep_groups).");
  const list = el("div", { id: "completions" }), count = el("span", { className: "muted", id: "found" });
  const more = el("button", { type: "button", click: () => { filter.count += SHOWN_AT_ONCE; fill(); } }, "show more");
  const fill = () => {
    const hits = found();
    count.textContent = `${hits.length.toLocaleString("en-US")} of ${COMPLETIONS.length.toLocaleString("en-US")} completions`;
    list.replaceChildren(...hits.slice(0, filter.count).map(completionCard));
    more.hidden = hits.length <= filter.count;
  };
  const set = (key) => (value) => { filter[key] = value; filter.count = SHOWN_AT_ONCE; fill(); };
  const steps = [...new Set(COMPLETIONS.map((c) => c.group.step))].sort((a, b) => b - a);
  const coloured = COMPLETIONS.some((c) => c.figures);
  const bar = el("div", { className: "bar" },
    MANY ? choice("run", [["", "all"], ...DATA.runs.map((run, i) => [String(i), visible(run.name)])], "", set("run")) : null,
    choice("step", [["", "all"], ...steps.map((step) => [String(step), String(step)])], "", set("step")),
    choice("show", Object.entries(ONLY).map(([key, [text]]) => [key, text]), "", set("only")),
    choice("order", Object.entries(SORTS).map(([key, [text]]) => [key, text]), "step", set("sort")),
    coloured ? choice("colour", Object.entries(TINTS), "none", set("tint")) : null,
    el("label", { className: "grow" }, "search", el("input", { type: "search", id: "search", placeholder: "in prompts and completions", input: (event) => set("search")(event.target.value) })),
    count);
  fill();
  return el("div", {}, bar, list, more);
}

// ------------------------------------------------------------------ prompts

// A table of prompts in an order of choice, with rows that open. Of an item: prompt, answer, cells(), detail(), and change,
// how much better it became.
function promptTable(items, heads, about) {
  const orders = { order: ["as in the data", () => 0], worse: ["got worse", (p) => p.change], better: ["got better", (p) => -p.change] };
  const body = el("tbody");
  let key = "order", count = 20;
  const more = el("button", { type: "button", click: () => { count += 100; fill(); } }, "show more");
  const fill = () => {
    more.hidden = items.length <= count;
    const sorted = items.map((p, i) => [orders[key][1](p), i, p]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).slice(0, count);
    body.replaceChildren(...sorted.flatMap(([, , p]) => {
      const detail = el("tr", { hidden: true, className: "detail" });
      const open = el("button", { type: "button", className: "quiet-button left", click: () => {
        detail.hidden = !detail.hidden;
        if (!detail.childNodes.length) detail.append(el("td", { colSpan: 99 }, p.detail()));
      } }, visible(p.prompt.replace(/\s+/g, " ").slice(0, 90)));
      return [el("tr", {}, el("td", {}, open), el("td", {}, visible(p.answer.slice(0, 40))), ...p.cells()), detail];
    }));
  };
  fill();
  return el("div", {},
    el("div", { className: "bar" }, choice("order", Object.entries(orders).map(([name, [text]]) => [name, text]), key, (value) => { key = value; fill(); }),
      el("span", { className: "muted" }, about)),
    el("div", { className: "scroll" }, el("table", { className: "prompts" }, el("thead", {}, el("tr", {}, el("th", {}, "prompt"), el("th", {}, "answer"), ...heads.map((head) => el("th", {}, head)))), body)), more);
}

function shareCell(value, text, title, tag = "td") {
  const cell = el(tag, { className: "cell", title }, text);
  if (value !== null) cell.style.backgroundColor = `rgba(40,160,90,${(0.75 * Math.min(1, Math.max(0, value))).toFixed(2)})`;
  return cell;
}

function fromFirstToLast(values) {
  const there = values.filter((value) => value !== null);
  return there.length ? there[there.length - 1] - there[0] : 0;
}

function heldOutSection() {
  const run = DATA.runs[0];
  const others = DATA.runs.map((r) => new Map(r.history.prompts.map((p) => [p.source, p])));
  const rows = run.history.prompts.filter((p) => others.every((of) => of.has(p.source)));
  if (!rows.length) return el("p", { className: "muted" }, "No validation has left its completions yet.");
  const share = (at) => (at && at[1] ? at[0] / at[1] : null);
  // of one run all validations, of several the last one of each
  const shownSteps = DATA.runs.map((r) => r.history.steps.map((step, k) => [step, k]).slice(MANY ? -1 : 0));
  const cells = (p, r) => shownSteps[r].map(([step, k]) => {
    const value = share(p.at[k]);
    return shareCell(value, value === null ? "" : shown(value, 2), value === null ? "" : `step ${step}: ${p.at[k][0]} of ${p.at[k][1]} right`);
  });
  const items = rows.map((p) => ({
    ...p, change: fromFirstToLast(p.at.map(share)),
    cells: () => DATA.runs.flatMap((_, i) => cells(others[i].get(p.source), i)),
    detail: () => el("div", { className: MANY ? "side" : "" }, ...DATA.runs.map((r, i) => promptDetail(r, others[i].get(p.source)))),
  }));
  const heads = DATA.runs.flatMap((r, i) => shownSteps[i].map(([step]) => (MANY ? `${visible(r.name)}, ${step}` : String(step))));
  return promptTable(items, heads, "share of a prompt's completions that were right, by the step of the validation; a row opens");
}

function promptDetail(run, p) {
  return el("div", { className: MANY ? "member" : "" }, MANY ? el("b", {}, visible(run.name)) : null, ...run.history.steps.map((step, k) => p.at[k] &&
    el("div", { className: "row start" }, el("span", { className: "muted" }, `step ${step}, ${p.at[k][0]} of ${p.at[k][1]} right${p.at[k][2] === null ? "" : "; the greedy one ends:"}`),
      p.at[k][2] === null ? null : el("pre", { className: "text" }, visible(p.at[k][2]) || "(empty)"))));
}

// Training prompts of which several groups are on the page: how their rewards moved from one time to the next.
function trainedSection() {
  const by = new Map();
  DATA.runs.forEach((run, r) => run.groups.forEach((group) => {
    const rewards = group.members.map((c) => c.reward).filter((value) => value !== null);
    const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
    by.set(group.source, [...(by.get(group.source) || []), { r, group, mean }]);
  }));
  const seen = [...by.values()].filter((times) => times.length > 1);
  if (!seen.length) return el("p", { className: "muted" }, "No training prompt has several groups among the completions above.");
  const name = ({ r, group }) => (MANY ? `${visible(DATA.runs[r].name)}, step ${group.step}` : `step ${group.step}`);
  const items = seen.map((times) => ({
    prompt: times[0].group.prompt, answer: times[0].group.answer, change: fromFirstToLast(times.map((time) => time.mean)),
    cells: () => [el("td", {}, el("div", { className: "facts" }, ...times.map((time) => shareCell(time.mean, `${name(time)}: ${shown(time.mean, 2)}`, `mean reward of ${time.group.members.length} completions`, "span"))))],
    detail: () => el("div", {}, ...times.map((time) => el("div", {}, el("p", { className: "muted" }, name(time)), el("div", { className: "side" }, ...time.group.members.map((m) => el("div", { className: "member" }, facts(m), textOf(m))))))),
  }));
  return promptTable(items, ["mean reward, each time that it was sampled"], `${items.length} prompts of which several groups are among the completions above; a row opens`);
}
