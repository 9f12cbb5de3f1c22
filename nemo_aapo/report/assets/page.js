// The sections of the page.

const main = document.getElementById("main"), nav = document.getElementById("nav"), top_ = document.getElementById("top");

function section(name, title, ...content) {
  nav.append(el("a", { href: `#${name}` }, title));
  main.append(el("section", { id: name }, el("h2", {}, title), ...content));
}

function table(head, rows, className) {
  return el("div", { className: "scroll" }, el("table", { className: className || "" },
    el("thead", {}, el("tr", {}, ...head.map((cell) => el("th", {}, cell)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, cell === null || cell === undefined ? "–" : cell)))))));
}

function tile(label, value, note) {
  return el("div", { className: "tile" }, el("span", { className: "muted" }, label), el("b", {}, value), el("span", { className: "muted" }, note || ""));
}

// ------------------------------------------------------------------ the head

function head() {
  const theme = el("button", { type: "button", id: "theme", title: "light or dark", click: () => {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  } }, "◐");
  const run = DATA.runs[0];
  const title = MANY ? `${DATA.runs.length} runs` : visible(run.name);
  top_.append(el("div", { className: "row" }, el("h1", {}, title, MANY ? null : badge(visible(run.state), run.state === "finished" ? "good" : run.state === "running" ? "up" : "")), theme));
  if (!MANY) top_.append(el("div", { className: "tiles" }, ...tilesOf(run)));
  top_.append(el("p", { className: "muted" }, `written ${DATA.made} by nemo_aapo ${DATA.version}`, MANY ? "" : ` from ${visible(run.directory)}`));
}

function tilesOf(run) {
  const step = last(run.steps.step), accuracy = run.validations["validation/accuracy_sampled"] || run.validations["validation/accuracy_greedy"] || [];
  const error = last(run.validations["validation/accuracy_sampled_stderr"]), hours = last(run.steps.hours), tokens = last(run.steps.tokens);
  const first = accuracy.find((value) => value !== null);
  return [
    tile("step", shown(step ?? 0), run.max_steps ? `of ${shown(Number(run.max_steps))}` : ""),
    tile("held-out accuracy", shown(last(accuracy)), `${error === null ? "" : `± ${shown(error)}, `}${first === undefined ? "" : `${shown(first)} at the start`}`),
    tile("reward", shown(last(run.steps["reward/mean"])), `reference ${shown(last(run.steps["reference_reward/mean"]))}`),
    tile("seconds a step", shown(hours && step ? (hours * 3600) / step : null, 2), hours ? `${duration(hours * 3600)} in steps` : ""),
    tile("tokens per second", shown(tokens && hours ? tokens / (hours * 3600) : null), tokens ? `${shown(tokens)} completion tokens` : ""),
    tile("cut completions", last(run.steps.truncated_fraction) === null ? "–" : `${(100 * last(run.steps.truncated_fraction)).toFixed(1)} %`, "in the last step"),
  ];
}

// ------------------------------------------------------------------ sections

function findingsOf(run) {
  if (!run.findings.length) return [el("p", { className: "finding fine" }, el("b", {}, "Nothing stands out. "), "No rule of docs/guide/watching_a_run.md has anything to say.")];
  return run.findings.map((f) => el("div", { className: `finding ${f.weight}` },
    el("p", {}, el("b", {}, visible(f.text.charAt(0).toUpperCase() + f.text.slice(1)), ".")), el("p", { className: "muted" }, f.remedy, " ", f.chart ? el("a", { href: `#chart-${f.chart}` }, "Show the curve") : null)));
}

function controls() {
  const range = el("span", { className: "muted", id: "range" });
  const field = (at) => el("input", { type: "number", className: "narrow", "aria-label": at === "min" ? "from" : "to", change: (event) => {
    const whole = plots.find(({ u }) => u).u.data[0], value = event.target.value;
    const now = view.range || { min: whole[0], max: whole[whole.length - 1] };
    const next = { ...now, [at]: value === "" ? whole[at === "min" ? 0 : whole.length - 1] : Number(value) };
    if (next.max > next.min) setRange(next);
  } });
  const from = field("min"), to = field("max");
  document.addEventListener("range", () => {
    from.value = view.range ? Number(view.range.min.toFixed(3)) : "";
    to.value = view.range ? Number(view.range.max.toFixed(3)) : "";
  });
  const seeds = DATA.alike.some((members) => members.length > 1);
  return el("div", { className: "bar", id: "controls" },
    choice("against", [["step", "steps"], ["tokens", "completion tokens"], ["hours", "hours in steps"]], "step", (value) => { view.axis = value; view.range = null; redraw(); }),
    el("label", {}, "smoothing", el("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: String(view.smoothing), id: "smoothing", input: (event) => { view.smoothing = Number(event.target.value); redraw(); } })),
    MANY && seeds ? el("label", {}, el("input", { type: "checkbox", checked: view.mean, change: (event) => { view.mean = event.target.checked; redraw(); } }), "mean of seeds, from lowest to highest") : null,
    el("label", {}, "from", from), el("label", {}, "to", to),
    el("button", { type: "button", click: () => setRange(null) }, "all"), range,
    el("span", { className: "muted" }, "drag across a plot to zoom, double click to see all"));
}

function chartsOf(name) {
  const drawnHere = MANY ? DATA.charts[name].filter((chart) => chart.kind !== "stack") : DATA.charts[name];
  return el("div", { className: "charts" }, ...drawnHere.map(chartCard));
}

function phasesTable() {
  const mean = (column) => { const there = (column || []).filter((v) => v !== null); return there.length ? there.reduce((a, b) => a + b, 0) / there.length : null; };
  const phases = DATA.charts.times.find((chart) => chart.name === "phases").metrics;
  return table(["run", "s a step", ...phases.map((name) => name.replace("time/", ""))],
    DATA.runs.map((run) => [visible(run.name), shown(mean(run.steps["time/step"]), 2), ...phases.map((name) => shown(mean(run.steps[name]), 2))]));
}

function checkpointsOf(run) {
  const time = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");
  return [
    run.checkpoints.length ? table(["checkpoint of step", "written (UTC)", "MiB", "reward", "held-out accuracy"], run.checkpoints.map((c) => [String(c.step), time(c.written), shown(c.bytes / 2 ** 20, 1), shown(c.reward), shown(c.accuracy)])) : el("p", { className: "muted" }, "No checkpoint yet."),
    el("h3", {}, "Starts"),
    table(["time", "host", "ranks", "computes by", "versions"], run.starts.map((s) => [visible(String(s.time)), visible(String(s.host)), String(s.world_size), visible(String(s.instruction_set ?? "–")), Object.entries(s.versions || {}).filter(([, v]) => v).map(([k, v]) => `${visible(k)} ${visible(String(v))}`).join(", ")])),
    ...(run.attempts.length ? [el("h3", {}, "Attempts on Slurm"), table(["job", "began (UTC)", "ended", "how", "step", "why"], run.attempts.map((a) => [visible(a.job), time(a.began), a.ended ? time(a.ended) : null, visible(a.end), String(a.step), visible(a.why)]))] : []),
  ];
}

function settingsOf(run) {
  const rows = (list) => list.map(([key, value, standard]) => [el("code", {}, key), el("code", {}, visible(value)), el("code", {}, visible(standard === value ? "" : standard))]);
  return [
    table(["set for this run", "value", "default"], rows(run.changed)),
    el("details", {}, el("summary", {}, `all ${run.settings.length} settings`), table(["setting", "value", "default"], rows(run.settings))),
  ];
}

function overviewTable() {
  const value = (run, metric) => last(run.validations[metric]);
  const SAMPLED = "validation/accuracy_sampled", GREEDY = "validation/accuracy_greedy";
  const sampled = DATA.runs.every((run) => run.validations[SAMPLED] || !run.validations[GREEDY]); // one column, one measure
  return table(["run", "state", "step", "held-out accuracy", "paired with the first", "reward", "hours in steps", "tokens"], DATA.runs.map((run, i) => {
    const error = sampled ? value(run, `${SAMPLED}_stderr`) : null, paired = DATA.paired[i];
    const name = el("label", {}, el("input", { type: "checkbox", checked: true, change: (event) => { view.hidden[event.target.checked ? "delete" : "add"](i); redraw(); } }), visible(run.name));
    return [name, visible(run.state), shown(last(run.steps.step)), `${shown(value(run, sampled ? SAMPLED : GREEDY))}${error === null ? "" : ` ± ${shown(error)}`}`,
      paired ? `${paired.difference >= 0 ? "+" : "−"}${shown(Math.abs(paired.difference))} ± ${shown(paired.stderr)} (step ${paired.step}, ${paired.prompts} prompts)` : null,
      shown(last(run.steps["reward/mean"])), shown(last(run.steps.hours), 2), shown(last(run.steps.tokens))];
  }));
}

function build() {
  main.replaceChildren();
  head();
  if (MANY) {
    section("overview", "Runs", overviewTable());
    section("differences", "What differs", DATA.differing.length ? table(["setting", ...DATA.runs.map((run) => visible(run.name))], DATA.differing.map((row) => [el("code", {}, row.key), ...row.values.map((v) => el("code", {}, visible(v ?? "–")))])) : el("p", { className: "muted" }, "No setting."));
  } else {
    section("findings", "What to look at", ...findingsOf(DATA.runs[0]));
  }
  section("curves", "Curves", controls(), chartsOf("curves"));
  section("times", "Where the time went", MANY ? phasesTable() : null, chartsOf("times"));
  if (!MANY && DATA.runs[0].traces.length) section("timeline", "Timeline of a step", timelineSection(DATA.runs[0].traces));
  section("groups", "Groups", chartsOf("groups"));
  section("rollouts", "Completions", completionsSection());
  section("prompts", "Held-out prompts", heldOutSection());
  section("trained", "Training prompts", trainedSection());
  if (MANY) {
    section("each", "What to look at", ...DATA.runs.flatMap((run) => [el("h3", {}, visible(run.name)), ...findingsOf(run)]));
  } else {
    section("checkpoints", "Checkpoints and starts", ...checkpointsOf(DATA.runs[0]));
    section("settings", "Settings", ...settingsOf(DATA.runs[0]));
  }
  redraw();
  if (location.hash.length > 1) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  document.body.dataset.ready = String(plots.filter(({ u }) => u).length); // what the tests wait for
}

build();
