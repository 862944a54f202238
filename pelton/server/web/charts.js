// Lines over time, drawn by hand, with a legend, a read-out under the pointer and a table of the same values.
import { el, setText } from "./dom.js";
import { clock } from "./format.js";
import { hover, palette, placeTip, Surface } from "./surface.js";

const AXIS = 20; // pixels under the plot, for the times
const TOP = 16; // above it, for the highest label
const TABLE_ROWS = 12;

/** The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `value`. */
function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= value * 0.9999);
}

const STEPS = [5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 21600];

/** Draws the grid of times; returns nothing. `bottom` is the y of the axis. */
export function timeAxis(context, from, to, width, bottom, top) {
  const colours = palette();
  const step = STEPS.find((s) => ((to - from) / s) * 74 <= width) ?? 43200;
  // Whole minutes and hours of the reader's clock, not of UTC.
  const zone = new Date(to * 1000).getTimezoneOffset() * 60;
  context.fillStyle = colours.muted;
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  context.textBaseline = "alphabetic";
  for (let t = Math.ceil((from - zone) / step) * step + zone; t <= to; t += step) {
    const x = Math.round(((t - from) / (to - from)) * width) + 0.5;
    context.beginPath();
    context.moveTo(x, top);
    context.lineTo(x, bottom);
    context.stroke();
    const text = clock(t, step < 60);
    const half = context.measureText(text).width / 2;
    if (x - half >= 0 && x + half <= width) context.fillText(text, x - half, bottom + 15);
  }
}

export class LineChart {
  /**
   * `section` gets the legend, the plot and the table. `series`: [{key, label, colour, dash, fill}] (names of History's
   * columns and of the palette); `format(value)` writes values with their unit.
   */
  constructor(section, series, format) {
    this.series = series;
    this.format = format;
    this.title = section.querySelector("h2").textContent;
    this.data = null;
    this.pointer = null;
    this.values = series.map(() => el("b", { text: "–" }));
    this.legend = el("ul", { class: "legend" }, ...series.map((one, index) => el("li", {},
      el("i", { class: `key key-${one.colour}${one.dash ? " dashed" : ""}` }), `${one.label} `, this.values[index])));
    this.canvas = el("canvas", { role: "img" });
    this.tip = el("div", { class: "tip", "aria-hidden": "true", hidden: true });
    this.table = el("tbody");
    this.details = el("details", { class: "as-table" }, el("summary", { text: "As a table" }),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${this.title}, as a table` },
        el("table", {}, el("caption", { class: "visually-hidden", text: this.title }),
          el("thead", {}, el("tr", {}, ...["Time", ...series.map(({ label }) => label)].map((text) => el("th", { scope: "col", text })))),
          this.table)));
    this.details.addEventListener("toggle", () => this.fillTable());
    section.append(this.legend, el("div", { class: "plot" }, this.canvas, this.tip), this.details);
    this.surface = new Surface(this.canvas, (...args) => this.draw(...args));
    hover(this.canvas, (x) => {
      this.pointer = x;
      if (x === null) this.tip.hidden = true;
      this.surface.redraw();
    });
  }

  /** Shows the columns of a History between two unix times. */
  show(data, from, to) {
    Object.assign(this, { data, from, to });
    const last = data.time.length - 1;
    const texts = this.series.map(({ key }) => this.format(last < 0 ? NaN : data[key][last]));
    texts.forEach((text, index) => setText(this.values[index], text));
    const spoken = this.series.map(({ label }, index) => `${label} ${texts[index]}`).join(", ");
    this.canvas.setAttribute("aria-label", `${this.title} over time. Now: ${spoken}. The values follow as a table.`);
    this.fillTable();
    this.surface.redraw();
  }

  fillTable() {
    if (!this.details.open || !this.data) return;
    const { time } = this.data;
    const every = Math.max(1, Math.floor(time.length / TABLE_ROWS));
    const rows = [];
    for (let i = time.length - 1; i >= 0 && rows.length < TABLE_ROWS; i -= every) {
      rows.push(el("tr", {}, el("th", { scope: "row", text: clock(time[i]) }),
        ...this.series.map(({ key }) => el("td", { text: this.format(this.data[key][i]) }))));
    }
    this.table.replaceChildren(...rows);
  }

  draw(context, width, height) {
    if (!this.data) return;
    const { data, from, to } = this;
    const bottom = height - AXIS;
    let highest = 0;
    for (const { key } of this.series) for (const value of data[key]) if (value > highest) highest = value;
    const ceiling = niceCeiling(highest);
    const x = (time) => ((time - from) / (to - from)) * width;
    const y = (value) => bottom - (value / ceiling) * (bottom - TOP);
    timeAxis(context, from, to, width, bottom, TOP);
    this.grid(context, width, ceiling, y);
    context.save();
    context.beginPath();
    context.rect(0, 0, width, bottom + 1);
    context.clip();
    for (const one of [...this.series].reverse()) this.line(context, one, x, y, bottom);
    context.restore();
    this.labels(context, ceiling, y);
    this.readout(context, width, x, y, bottom);
  }

  grid(context, width, ceiling, y) {
    const colours = palette();
    context.strokeStyle = colours.line;
    for (const part of [0, 0.5, 1]) {
      const at = Math.round(y(ceiling * part)) + 0.5;
      context.beginPath();
      context.moveTo(0, at);
      context.lineTo(width, at);
      context.stroke();
    }
  }

  /** Over the lines, with a rim, so that they can be read anywhere. */
  labels(context, ceiling, y) {
    const colours = palette();
    context.strokeStyle = colours.surface;
    context.fillStyle = colours.muted;
    context.lineWidth = 3;
    for (const part of [0.5, 1]) {
      const text = this.format(ceiling * part);
      context.strokeText(text, 2, y(ceiling * part) - 4);
      context.fillText(text, 2, y(ceiling * part) - 4);
    }
    context.lineWidth = 1;
  }

  line(context, { key, colour, dash, fill }, x, y, bottom) {
    const { time, step } = this.data;
    const values = this.data[key];
    const gap = step * 3 + 1; // seconds without a message: the line breaks
    context.strokeStyle = context.fillStyle = palette()[colour];
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    context.setLineDash(dash ? [4, 3] : []);
    const finish = (run) => {
      if (!run.length) return;
      context.beginPath();
      for (const i of run) context.lineTo(x(time[i]), y(values[i]));
      if (run.length === 1) context.lineTo(x(time[run[0]]) + 1.5, y(values[run[0]]));
      context.stroke();
      if (!fill) return;
      context.lineTo(x(time[run.at(-1)]), bottom);
      context.lineTo(x(time[run[0]]), bottom);
      context.globalAlpha = 0.1;
      context.fill();
      context.globalAlpha = 1;
    };
    let run = [];
    for (let i = 0; i < time.length; i += 1) {
      if (!Number.isFinite(values[i]) || (run.length && time[i] - time[run.at(-1)] > gap)) { finish(run); run = []; }
      if (Number.isFinite(values[i])) run.push(i);
    }
    finish(run);
    context.setLineDash([]);
  }

  readout(context, width, x, y, bottom) {
    const { data, from, to } = this;
    if (this.pointer === null || !data.time.length) return;
    const wanted = from + (this.pointer / width) * (to - from);
    let at = 0;
    for (let i = 1; i < data.time.length; i += 1) if (Math.abs(data.time[i] - wanted) < Math.abs(data.time[at] - wanted)) at = i;
    const colours = palette();
    const px = x(data.time[at]);
    context.strokeStyle = colours["line-strong"];
    context.beginPath();
    context.moveTo(px, TOP);
    context.lineTo(px, bottom);
    context.stroke();
    for (const { key, colour } of this.series) {
      if (!Number.isFinite(data[key][at])) continue;
      context.fillStyle = colours[colour];
      context.beginPath();
      context.arc(px, y(data[key][at]), 3.5, 0, 7);
      context.fill();
    }
    this.tip.replaceChildren(el("b", { text: clock(data.time[at]) }),
      ...this.series.map(({ key, label, colour }) => el("span", {}, el("i", { class: `key key-${colour}` }),
        `${label} ${this.format(data[key][at])}`)));
    placeTip(this.tip, px, width);
  }
}
