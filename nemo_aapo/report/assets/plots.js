"use strict";
// What all sections share: the data, elements made without HTML, numbers as text; and the plots.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MANY = DATA.runs.length > 1;

// An element. Strings become text nodes, never HTML; functions become listeners.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function colour(index) {
  return css(`--c${(index % 8) + 1}`);
}

// A number for people: "0.412", "12,345", "3.1e-7".
function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
  return Number.isInteger(value) ? String(value) : value.toFixed(size >= 100 ? 1 : digits);
}

function duration(seconds) {
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  if (seconds < 6000) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} d`;
}

function last(column) {
  const there = (column || []).filter((value) => value !== null);
  return there.length ? there[there.length - 1] : null;
}

// ------------------------------------------------------------------ plots

const view = { axis: "step", smoothing: 0.6, range: null, mean: true, hidden: new Set() };
const plots = [];
let zooming = false;

// Exponential moving average that does not favour the first value; gaps stay gaps.
function smoothed(values, factor) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

function tableOf(run, chart) {
  return chart.validation ? run.validations : run.steps;
}

function columnOf(run, chart, metric) {
  const table = tableOf(run, chart);
  const column = table[metric];
  return column && column.some((value) => value !== null) ? column : null;
}

// The lines of a chart: {label, x, y, colour, low, high} each, with a band where low and high are.
function linesOf(chart) {
  if (MANY) return view.mean ? meanLines(chart) : DATA.runs.flatMap((run, i) => runLine(run, chart, i));
  const run = DATA.runs[0];
  return chart.metrics.flatMap((metric, i) => {
    const y = columnOf(run, chart, metric);
    if (!y) return [];
    const error = i === 0 && chart.error ? columnOf(run, chart, chart.error) : null;
    const band = error ? { low: y.map((v, k) => off(v, error[k], -1)), high: y.map((v, k) => off(v, error[k], 1)) } : {};
    return [{ label: metric.replace(/^(validation|time|groups)\//, ""), x: tableOf(run, chart)[view.axis], y, tint: chart.tints[i] ?? i, ...band }];
  });
}

function off(value, error, sign) {
  return value === null || error === null || error === undefined ? null : value + sign * error;
}

function runLine(run, chart, index) {
  const y = columnOf(run, chart, chart.metrics[0]);
  return y && !view.hidden.has(index) ? [{ label: run.name, x: tableOf(run, chart)[view.axis], y, tint: index }] : [];
}

// Runs that differ by their seed alone as one mean, with a band from the lowest to the highest of them.
function meanLines(chart) {
  return DATA.alike.flatMap((members, tint) => {
    const left = members.filter((i) => !view.hidden.has(i)), runs = left.map((i) => DATA.runs[i]);
    const lines = left.flatMap((i) => runLine(DATA.runs[i], chart, i));
    if (lines.length < 2) return lines.map((line) => ({ ...line, tint }));
    const at = new Map();
    for (const run of runs) {
      const table = tableOf(run, chart), y = columnOf(run, chart, chart.metrics[0]);
      if (!y) continue;
      table.step.forEach((step, k) => {
        if (y[k] === null) return;
        if (!at.has(step)) at.set(step, { x: [], y: [] });
        at.get(step).x.push(table[view.axis][k]);
        at.get(step).y.push(y[k]);
      });
    }
    const whole = [...at.entries()].filter(([, v]) => v.y.length === lines.length).sort((a, b) => a[0] - b[0]);
    const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
    return [{
      label: `${runs[0].name} (${lines.length} seeds)`, tint, x: whole.map(([, v]) => mean(v.x)), y: whole.map(([, v]) => mean(v.y)),
      low: whole.map(([, v]) => Math.min(...v.y)), high: whole.map(([, v]) => Math.max(...v.y)),
    }];
  });
}

function plotOf(chart) {
  const lines = linesOf(chart);
  if (lines.length < (chart.kind === "stack" ? 2 : 1)) return null;
  return chart.kind === "stack" ? stacked(chart, lines) : drawn(chart, lines);
}

function drawn(chart, lines) {
  const tables = [], series = [{}], bands = [];
  const add = (line, y, options) => { tables.push([line.x, y]); series.push(options); };
  const points = { show: Boolean(chart.validation), size: 5 };
  const few = lines.every((line) => line.x.length < 5);
  for (const line of lines) {
    const stroke = colour(line.tint), smooth = !chart.validation && !few && view.smoothing > 0;
    const soft = (y) => (smooth ? smoothed(y, view.smoothing) : y);
    if (line.low) {
      add(line, soft(line.high), { show: true, stroke: "transparent", points: { show: false }, label: "", class: "quiet" });
      add(line, soft(line.low), { show: true, stroke: "transparent", points: { show: false }, label: "", class: "quiet" });
      bands.push({ series: [series.length - 2, series.length - 1], fill: faint(stroke, 0.2) });
    }
    if (smooth && !line.low) add(line, line.y, { stroke: faint(stroke, 0.3), width: 1, points: { show: false }, label: "", class: "quiet" });
    const raw = smooth && !line.low ? 1 : 0; // the legend has the value itself; away from the plot the latest
    const value = (u, v, s, i) => shown(i === null ? last(u.data[s - raw]) : u.data[s - raw][i]);
    add(line, soft(line.y), { stroke, width: 2, label: line.label, value, points: { ...points, fill: stroke }, spanGaps: true });
  }
  return { data: uPlot.join(tables), series, bands };
}

function stacked(chart, lines) {
  const x = lines[0].x, own = lines.map((line) => (view.smoothing ? smoothed(line.y, view.smoothing) : line.y));
  const sums = own.map((_, k) => x.map((_, i) => own.slice(0, k + 1).reduce((total, y) => total + (y[i] || 0), 0)));
  const order = own.map((_, k) => k).reverse(); // the highest first: the lower ones are painted over it
  const series = [{}, ...order.map((k) => ({
    label: lines[k].label, stroke: colour(lines[k].tint), fill: colour(lines[k].tint), width: 0, points: { show: false },
    value: (u, v, s, i) => shown(i === null ? last(own[k]) : own[k][i]),
  }))];
  return { data: [x, ...order.map((k) => sums[k])], series, bands: [] };
}

function faint(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

function draw(plot) {
  const made = plotOf(plot.chart);
  if (plot.u) plot.u.destroy();
  plot.u = null;
  plot.card.hidden = !made;
  if (!made) return;
  const axis = { stroke: css("--muted"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: `11px ${css("--font")}` };
  const options = {
    width: plot.box.clientWidth || 320, height: 190, series: made.series, bands: made.bands,
    cursor: { drag: { x: true, y: false }, sync: { key: "runs" }, points: { size: 6 } },
    scales: { x: { time: false }, y: { range: plot.chart.kind === "stack" ? (u, low, high) => [0, high || 1] : padded } },
    axes: [{ ...axis, size: 28 }, { ...axis, size: 52, values: tickTexts }],
    legend: { live: true, markers: { width: 8 } },
    hooks: { setScale: [(u, key) => key === "x" && zoomed(u)] },
  };
  zooming = true;
  plot.u = new uPlot(options, made.data, plot.box);
  if (view.range) plot.u.setScale("x", view.range);
  zooming = false;
}

// As many decimals as tell the ticks apart.
function tickTexts(u, ticks, axis, space, step) {
  let digits = 0;
  while (digits < 5 && Math.abs(Math.round(step * 10 ** digits) - step * 10 ** digits) > 1e-6) digits += 1;
  return ticks.map((tick) => (digits > 4 || Math.abs(tick) >= 1e5 ? shown(tick) : tick.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })));
}

function padded(u, low, high) {
  if (low === null) return [0, 1];
  const flat = high - low < 1e-6 * Math.abs(high); // what smoothing leaves of a constant is no curve
  const room = (flat ? 0 : (high - low) * 0.08) || Math.abs(high) * 0.1 || 0.1;
  return [low >= 0 && low < 3 * room ? 0 : low - room, high + room];
}

// What one plot shows of the x axis, all show.
function zoomed(u) {
  if (zooming) return;
  const { min, max } = u.scales.x;
  const whole = min <= u.data[0][0] && max >= u.data[0][u.data[0].length - 1];
  setRange(whole ? null : { min, max });
}

function setRange(range) {
  view.range = range;
  zooming = true;
  for (const { u } of plots) {
    if (u) u.setScale("x", range || { min: u.data[0][0], max: u.data[0][u.data[0].length - 1] });
  }
  zooming = false;
  document.dispatchEvent(new CustomEvent("range"));
}

function redraw() {
  plots.forEach(draw);
}

function chartCard(chart) {
  const box = el("div", { className: "plot" });
  const card = el("figure", { className: chart.kind === "stack" ? "chart wide" : "chart", id: `chart-${chart.name}` },
    el("figcaption", {}, el("b", {}, chart.title), el("span", {}, chart.about)), box);
  plots.push({ chart, card, box, u: null });
  return card;
}

new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let resized = 0;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => plots.forEach(({ u, box }) => u && u.setSize({ width: box.clientWidth, height: 190 })), 100);
});
