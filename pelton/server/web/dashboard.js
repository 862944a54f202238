// The dashboard: collects the server's messages, and draws them while someone looks.
import { LineChart } from "./charts.js";
import { announce, byId, el, setText } from "./dom.js";
import { count, ms, rate, uptime } from "./format.js";
import { History } from "./history.js";
import { KvMap } from "./kvmap.js";
import { LiveStream } from "./live.js";
import { makeGauges, makePercentiles, makeTiles, MEASURES, showGoodput, showOps, showReplicas, showTotals } from "./panels.js";
import { Timeline } from "./timeline.js";

// A coarser point shows the mean of rates and counts, but the highest of latencies: a spike must not vanish.
const FIELDS = { output: "mean", prompt: "mean", finished: "mean", running: "mean", waiting: "mean" };
for (const [key] of MEASURES) for (const p of ["p50", "p90", "p99"]) FIELDS[`${key}.${p}`] = "max";

const TILE_S = 5; // rates of half a second jump too much to be read as numbers
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

const history = new History(FIELDS);
const timeline = new Timeline(byId("requests"));
const kvMap = new KvMap(byId("kv"));
const showTiles = makeTiles();
const showGauges = makeGauges();
const showPercentiles = makePercentiles();
// Prompts are read many times faster than answers are written: each has its own scale.
const output = new LineChart(byId("output"), [{ key: "output", label: "output", colour: "output", fill: true }], rate);
const prompt = new LineChart(byId("prompt"), [{ key: "prompt", label: "prompt", colour: "prompt", fill: true }], rate);
const load = new LineChart(byId("load"), [
  { key: "running", label: "running", colour: "output", fill: true },
  { key: "waiting", label: "waiting", colour: "wait", dash: true },
], (value) => (Number.isInteger(value) ? count(value) : rate(value)));
let latencyChart = null;
let measure = MEASURES[0][0];

let latest = null;
let paused = false;
let kept = null; // while paused: what the charts show, for each range
let connection = "connecting";
let detail = {};

function chooseMeasure(key) {
  measure = key;
  const section = byId("latency-over-time");
  for (const button of section.querySelectorAll(".choices button")) button.setAttribute("aria-pressed", String(button.value === key));
  for (const old of section.querySelectorAll(".legend, .plot, .as-table")) old.remove();
  latencyChart = new LineChart(section, [
    { key: `${key}.p50`, label: "p50", colour: "output" },
    { key: `${key}.p90`, label: "p90", colour: "third" },
    { key: `${key}.p99`, label: "p99", colour: "prompt", dash: true },
  ], ms);
  drawCharts();
}

function collect(message) {
  latest = message;
  const values = {
    output: message.output_tokens_per_s, prompt: message.prompt_tokens_per_s, finished: message.requests_per_s,
    running: message.running, waiting: message.waiting,
  };
  for (const [key] of MEASURES) for (const p of ["p50", "p90", "p99"]) values[`${key}.${p}`] = message.latency[key]?.[p] ?? NaN;
  history.push(message.time, values);
  timeline.add(message); // cheap, and it must not miss a request
  if (!paused && !document.hidden) draw();
}

function draw() {
  if (!latest) return;
  byId("about").replaceChildren(el("b", { text: latest.model }), ` · version ${latest.version} · up ${uptime(latest.uptime_s)}`);
  const { output: out, prompt: read, finished } = history.read(TILE_S);
  showTiles(latest, { output: mean(out), prompt: mean(read), finished: mean(finished) });
  showGauges(latest);
  showPercentiles(latest);
  showGoodput(latest);
  showOps(latest);
  showTotals(latest);
  showReplicas(latest);
  kvMap.show(latest.kv_map);
  timeline.show();
  drawCharts();
}

function drawCharts() {
  if (!latest) return;
  const seconds = byId("range").value;
  const data = kept?.get(seconds) ?? history.read(Number(seconds));
  const end = data.time.at(-1);
  for (const chart of [output, prompt, load, latencyChart]) chart.show(data, end - seconds, end);
}

// The state in the header

function showState() {
  const texts = {
    connecting: "Connecting", live: "Live", refused: "API key needed",
    waiting: `Reconnecting in ${detail.seconds} s`,
  };
  const state = paused && connection === "live" ? "paused" : connection;
  byId("state").dataset.state = state;
  byId("state").title = paused ? "The numbers stand still; data is still collected" : detail.problem ?? "";
  setText(byId("state-text"), state === "paused" ? "Paused" : texts[state]);
  byId("retry").hidden = state !== "waiting" && state !== "refused";
  setText(byId("retry"), state === "refused" ? "Enter" : "Now");
  byId("panels").classList.toggle("stale", latest !== null && !["live", "paused"].includes(state));
}

function connectionChanged(state, more = {}) {
  const before = connection;
  [connection, detail] = [state, more];
  if (before === state && state === "live") return;
  showState();
  // The countdown is not spoken, and neither is each attempt.
  if (state === "live") announce("The dashboard is live");
  else if (state === "refused" || (state === "waiting" && before !== "waiting")) announce(`Not connected. ${more.problem}`);
}

function setPaused(value) {
  paused = value;
  kept = paused ? new Map([...byId("range").options].map((range) => [range.value, history.read(Number(range.value))])) : null;
  const button = byId("pause");
  button.setAttribute("aria-pressed", String(paused));
  button.setAttribute("aria-label", "Pause");
  button.title = paused ? "Continue" : "Pause";
  button.querySelector("use").setAttribute("href", `/web/icons.svg#${paused ? "play" : "pause"}`);
  showState();
  if (!paused) draw();
}

byId("latency-over-time").querySelector(".choices").append(...MEASURES.map(([key, label]) => el("button", {
  type: "button", value: key, text: label, on: { click: () => chooseMeasure(key) },
})));
chooseMeasure(measure);
byId("pause").addEventListener("click", () => setPaused(!paused));
byId("range").addEventListener("change", drawCharts);
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) draw(); });
const stream = new LiveStream("/dashboard/events", collect, connectionChanged);
byId("retry").addEventListener("click", () => stream.retry());
