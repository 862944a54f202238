// Requests of the last minute as bars (waiting, prefill, decode), above the tokens of each step on the same time axis.
import { timeAxis } from "./charts.js";
import { el } from "./dom.js";
import { clock, count, ms, NONE } from "./format.js";
import { hover, palette, placeTip, Surface } from "./surface.js";

const WINDOW_S = 60;
const MAX_REQUESTS = 4000;
const MAX_STEPS = 6000;
const GAP_S = 0.25; // between two requests in one lane
const STRIP = 48; // pixels of the steps
const AXIS = 20;
const TABLE_ROWS = 20;

const secondsBetween = (a, b) => (a === null || b === null ? NaN : (b - a) * 1000);
const failed = (request) => request.finished !== null && ["error", "abort"].includes(request.reason);

export class Timeline {
  constructor(section) {
    this.requests = new Map();
    this.steps = [];
    this.now = 0;
    this.shown = null; // what is drawn, whatever is added meanwhile: {now, requests, steps, lanes}
    this.pointer = null;
    this.bars = [];
    this.canvas = el("canvas", { role: "img" });
    this.tip = el("div", { class: "tip", "aria-hidden": "true", hidden: true });
    this.table = el("tbody");
    const heads = ["Request", "Replica", "Arrived", "Waited", "TTFT", "Total", "Prompt (cached)", "Output", "End"];
    this.details = el("details", { class: "as-table" }, el("summary", { text: "As a table" }),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Requests, as a table" }, el("table", {},
        el("caption", { class: "visually-hidden", text: "Requests of the last 60 seconds, latest first" }),
        el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { scope: "col", text })))), this.table)));
    this.details.addEventListener("toggle", () => this.fillTable());
    section.append(
      el("ul", { class: "legend" }, ...[["wait", "waiting"], ["prompt", "prefill"], ["output", "decode"], ["danger", "ended with an error or abort"]]
        .map(([colour, label]) => el("li", {}, el("i", { class: `key block key-${colour}` }), label))),
      el("div", { class: "plot tall" }, this.canvas, this.tip), this.details);
    this.surface = new Surface(this.canvas, (...args) => this.draw(...args));
    hover(this.canvas, (x, y) => {
      this.pointer = x === null ? null : [x, y];
      if (x === null) this.tip.hidden = true;
      this.surface.redraw();
    });
  }

  /** Takes a message; what left the window is forgotten. */
  add(message) {
    if (message.time === this.now) return; // the same message again
    if (message.time < this.now - 5) { // another server, or its clock was set back
      this.requests.clear();
      this.steps = [];
    }
    this.now = message.time;
    const since = this.now - WINDOW_S - 1;
    const seen = new Set();
    for (const request of message.requests) {
      const key = `${request.replica}/${request.id}`;
      seen.add(key);
      const lane = this.requests.get(key)?.lane ?? null;
      this.requests.set(key, { ...request, lane });
    }
    for (const [key, request] of this.requests) {
      // Each message has every unfinished request: one that is missing went with its server.
      if (request.finished === null ? !seen.has(key) : request.finished < since) this.requests.delete(key);
    }
    if (this.requests.size > MAX_REQUESTS) {
      const oldest = [...this.requests].sort((a, b) => a[1].arrived - b[1].arrived);
      for (const [key] of oldest.slice(0, this.requests.size - MAX_REQUESTS)) this.requests.delete(key);
    }
    this.steps.push(...message.steps);
    let first = 0;
    while (first < this.steps.length && this.steps[first].t < since) first += 1;
    first = Math.max(first, this.steps.length - MAX_STEPS);
    if (first) this.steps.splice(0, first);
  }

  /** Gives each new request the lowest lane that is free from its arrival on; returns the number of lanes. */
  assignLanes(requests) {
    const ends = [];
    const taken = (request) => { ends[request.lane] = Math.max(ends[request.lane] ?? -Infinity, request.finished ?? Infinity); };
    const all = requests.toSorted((a, b) => a.arrived - b.arrived);
    for (const request of all) if (request.lane !== null) taken(request);
    for (const request of all) {
      if (request.lane !== null) continue;
      let lane = 0;
      while (lane < ends.length && !((ends[lane] ?? -Infinity) + GAP_S <= request.arrived)) lane += 1;
      request.lane = lane;
      taken(request);
    }
    return Math.max(1, ends.length);
  }

  show() {
    const all = [...this.requests.values()];
    this.shown = { now: this.now, requests: all, steps: [...this.steps], lanes: this.assignLanes(all) };
    const waiting = all.filter((request) => request.scheduled === null && request.finished === null).length;
    const running = all.filter((request) => request.scheduled !== null && request.finished === null).length;
    const bad = all.filter(failed).length;
    this.canvas.setAttribute("aria-label", `Timeline of the requests of the last 60 seconds: ${all.length} requests, `
      + `${waiting} waiting, ${running} running, ${bad} ended with an error or abort. They follow as a table.`);
    this.fillTable();
    this.surface.redraw();
  }

  fillTable() {
    if (!this.details.open || !this.shown) return;
    const latest = this.shown.requests.toSorted((a, b) => b.arrived - a.arrived).slice(0, TABLE_ROWS);
    this.table.replaceChildren(...latest.map((request) => el("tr", {}, el("th", { scope: "row", text: request.id }),
      ...this.facts(request).map((text) => el("td", { text })))));
  }

  facts(request) {
    const { arrived, scheduled, first_token: first, finished } = request;
    const prompt = count(request.prompt_tokens) + (request.cached_tokens ? ` (${count(request.cached_tokens)})` : "");
    return [request.replica, clock(arrived), ms(secondsBetween(arrived, scheduled)), ms(secondsBetween(arrived, first)),
      ms(secondsBetween(arrived, finished)), prompt, count(request.output_tokens), request.reason ?? (finished === null ? "unfinished" : NONE)];
  }

  draw(context, width, height) {
    if (!this.shown) return;
    const colours = palette();
    const { now: to, requests, lanes } = this.shown;
    const from = to - WINDOW_S;
    const x = (time) => ((time - from) / WINDOW_S) * width;
    const bottom = height - AXIS;
    const room = bottom - STRIP - 8;
    timeAxis(context, from, to, width, bottom, 0);
    const pitch = Math.max(3, Math.min(16, room / lanes));
    const thick = Math.max(2, pitch - (pitch > 8 ? 3 : 1));
    this.bars = [];
    let hidden = 0;
    for (const request of requests) {
      const top = request.lane * pitch;
      if (top + thick > room) { hidden += 1; continue; }
      this.bar(context, request, x, top, thick);
    }
    if (hidden) this.note(context, `+ ${count(hidden)} more`, width, room);
    if (!requests.length) {
      context.fillStyle = colours.muted;
      context.fillText("No requests in the last 60 seconds", 4, 14);
    }
    this.strip(context, x, bottom);
    this.readout(context, width, thick);
  }

  bar(context, request, x, top, thick) {
    const colours = palette();
    const end = request.finished ?? this.shown.now;
    const phases = [
      [request.arrived, request.scheduled ?? end, "wait"],
      [request.scheduled, request.first_token ?? end, "prompt"],
      [request.first_token, end, "output"],
    ];
    const left = Math.max(0, x(request.arrived));
    for (const [start, stop, colour] of phases) {
      if (start === null) continue;
      const a = Math.max(0, x(start));
      const b = x(stop);
      if (b < 0) continue;
      context.fillStyle = colours[colour];
      // Waiting is a thinner bar, so that the phases differ without their colours too.
      if (colour === "wait") context.fillRect(a, top + thick * 0.3, Math.max(b - a, 1), Math.max(1, thick * 0.4));
      else context.fillRect(a, top, Math.max(b - a, 1), thick);
    }
    const right = Math.max(x(end), left + 2);
    if (failed(request)) {
      context.fillStyle = colours.danger;
      context.fillRect(right - 3, top, 4, thick);
    }
    if (right > 0) this.bars.push({ request, left, right, top });
    const decode = request.first_token === null ? 0 : x(end) - Math.max(0, x(request.first_token));
    if (thick >= 12 && decode > 44) {
      context.fillStyle = colours.surface;
      context.fillText(count(request.output_tokens), Math.max(0, x(request.first_token)) + 5, top + thick - 3);
    }
  }

  note(context, text, width, room) {
    const colours = palette();
    const wide = context.measureText(text).width;
    context.fillStyle = colours.surface;
    context.fillRect(width - wide - 12, room - 16, wide + 12, 18);
    context.fillStyle = colours.muted;
    context.fillText(text, width - wide - 6, room - 3);
  }

  /** Each step from its begin to its end; as high as its tokens: decode below, prefill above. */
  strip(context, x, bottom) {
    const colours = palette();
    const { steps } = this.shown;
    let highest = 1;
    for (const step of steps) highest = Math.max(highest, step.prefill + step.decode);
    context.fillStyle = colours.muted;
    context.fillText(`tokens per step, up to ${count(highest)}`, 2, bottom - STRIP + 8);
    for (const step of steps) {
      const left = x(step.t - step.s);
      const wide = Math.max(1, x(step.t) - left - 0.5);
      const scale = (STRIP - 16) / highest;
      const decode = step.decode * scale;
      context.fillStyle = colours.output;
      context.fillRect(left, bottom - decode, wide, decode);
      context.fillStyle = colours.prompt;
      context.fillRect(left, bottom - decode - step.prefill * scale, wide, step.prefill * scale);
    }
    context.strokeStyle = colours.line;
    context.strokeRect(-1, bottom + 0.5, context.canvas.width + 2, 0);
  }

  readout(context, width, thick) {
    if (!this.pointer) return;
    const [px, py] = this.pointer;
    const bar = this.bars.find(({ left, right, top }) => px >= left - 2 && px <= right + 2 && py >= top - 1 && py <= top + thick + 1);
    if (!bar) { this.tip.hidden = true; return; }
    context.strokeStyle = palette().text;
    context.strokeRect(bar.left - 0.5, bar.top - 0.5, bar.right - bar.left + 1, thick + 1);
    const [replica, arrived, waited, ttft, total, prompt, output, end] = this.facts(bar.request);
    this.tip.replaceChildren(el("b", { text: bar.request.id }), ...[
      `arrived ${arrived} on replica ${replica}`, `waited ${waited}, TTFT ${ttft}`, `${total === NONE ? "" : `total ${total}, `}${end}`,
      `${prompt} → ${output} tokens`].map((text) => el("span", { text })));
    placeTip(this.tip, px, width);
  }
}
