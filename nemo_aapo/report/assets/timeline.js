// The traced steps: what each process did when. Names come from files and are only ever text.

const KIND_TINTS = { "micro-batch": 2, collective: 3, wait: 5, score: 6, server: 7, part: 4 };
const PHASE_TINTS = { rollout: 0, reward: 1, reference: 4, train: 2, refit: 3 };

function tintOf(name, kind) {
  if (kind === "step") return "var(--line)";
  if (kind === "phase") return name in PHASE_TINTS ? colour(PHASE_TINTS[name]) : "var(--grid)";
  return colour(KIND_TINTS[kind] ?? 5);
}

function milliseconds(us) {
  return us >= 1e6 ? `${(us / 1e6).toFixed(2)} s` : `${(us / 1e3).toFixed(us < 1e4 ? 2 : 1)} ms`;
}

function spanOf([name, kind, start, time, depth], whole) {
  const plain = kind === "step" || (kind === "phase" && !(name in PHASE_TINTS));
  const box = el("span", { className: plain ? "span plain" : "span",
    title: `${visible(name)} (${visible(kind)}): ${milliseconds(time)}, ${((100 * time) / whole).toFixed(1)} % of what is shown, from ${milliseconds(start)}` },
    time > 0.04 * whole ? visible(name) : "");
  Object.assign(box.style, { left: `${(100 * start) / whole}%`, width: `${(100 * time) / whole}%`, top: `${depth * 17}px`, background: tintOf(name, kind) });
  return box;
}

function timelineOf(trace) {
  let process = "";
  const rows = trace.tracks.flatMap(([owner, track, spans]) => {
    const lane = el("div", { className: "lane" }, ...spans.map((span) => spanOf(span, trace.span_us)));
    lane.style.height = `${17 * (1 + Math.max(...spans.map((span) => span[4])))}px`;
    const head = owner === process ? [] : [el("b", { className: "process" }, visible(owner))];
    process = owner;
    return [...head, el("div", { className: "track" }, el("span", { className: "muted" }, visible(track)), lane)];
  });
  const { ranks, machines, clocks_agree_to_us: apart, left_out: cut } = trace.about;
  const facts = [`step ${trace.step}: ${milliseconds(trace.span_us)} on ${shown(ranks)} rank${ranks > 1 ? "s" : ""}`,
    machines > 1 ? `clocks of ${shown(machines)} machines agree to ${milliseconds(apart)}` : "", cut ? `${shown(cut)} spans left out of the file` : ""];
  return el("div", {}, el("p", { className: "muted" }, facts.filter(Boolean).join(" · ")), el("div", { className: "timeline" }, ...rows));
}

function timelineSection(traces) {
  const drawn = traces.filter((trace) => trace.tracks), box = el("div");
  const show = (step) => box.replaceChildren(timelineOf(drawn.find((trace) => trace.step === Number(step))));
  if (drawn.length) show(drawn[0].step);
  const legend = [["phase of the loop", "var(--grid)"], ["rollout", colour(0)], ["train, micro-batch", colour(2)], ["collective", colour(3)], ["wait", colour(5)], ["score", colour(6)], ["server", colour(7)]];
  return el("div", {},
    el("div", { className: "bar" }, drawn.length > 1 ? choice("step", drawn.map((trace) => [String(trace.step), String(trace.step)]), String(drawn[0].step), show) : null,
      ...legend.map(([text, tint]) => { const mark = el("span", { className: "mark" }); mark.style.background = tint; return el("label", {}, mark, text); })),
    box,
    el("p", { className: "muted" }, "The longest spans. All of them, zoomed: open in ui.perfetto.dev or chrome://tracing ",
      ...traces.flatMap((trace, i) => [i ? ", " : "", el("code", {}, trace.file), ` (${shown(Math.ceil(trace.bytes / 1000))} kB)`]), "."));
}
