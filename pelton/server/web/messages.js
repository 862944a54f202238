// Views of messages: what was asked, and the answer that may still grow.
import { copyFrom, el, iconButton } from "./dom.js";
import { count, ms } from "./format.js";
import { codeBlock, MarkdownView } from "./markdown_view.js";

const ENDS = { length: "cut at max_tokens", content_filter: "filtered", abort: "stopped by the server" };

/** The parts of the line under an answer: [text, explanation]. */
function statsOf(message) {
  const { stats, finish, state } = message;
  if (!stats) return [];
  const parts = [];
  const add = (text, title) => parts.push([text, title]);
  if (stats.ttft_ms !== null) add(`TTFT ${ms(stats.ttft_ms)}`, "From sending to the first token, by this browser's clock");
  if (stats.tokens_per_s !== null) add(`${stats.tokens_per_s.toFixed(1)} tokens/s`, "Tokens after the first, by the time since the first");
  if (stats.completion_tokens !== null) {
    const cached = stats.cached_tokens ? ` (${count(stats.cached_tokens)} cached)` : "";
    const prompt = `${count(stats.prompt_tokens ?? 0)}${cached}`;
    add(`${prompt} → ${count(stats.completion_tokens)} tokens`, "Tokens of the prompt → tokens of the answer");
  }
  add(ms(stats.total_ms), "From sending to the end");
  if (state === "stopped") add("stopped", "You stopped this answer");
  else if (ENDS[finish]) add(ENDS[finish], `finish_reason: ${finish}`);
  return parts;
}

/** A message of the reader; `actions.edit(text)` is offered on the last one. */
export class QuestionView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.editing = false;
    this.root = el("article", { class: "message user", "aria-label": "You" });
    this.show(false);
  }

  /** `last`: the message may be edited. */
  show(last) {
    if (last && this.editing) return; // what is being typed stays
    this.editing = false;
    const tools = el("div", { class: "tools" }, iconButton("copy", "Copy", (event) => copyFrom(event.currentTarget, this.message.content)));
    if (last) tools.prepend(iconButton("edit", "Edit", () => this.edit()));
    this.root.replaceChildren(el("div", { class: "bubble", text: this.message.content }), tools);
  }

  edit() {
    this.editing = true;
    const area = el("textarea", { "aria-label": "Edit the message" });
    area.value = this.message.content;
    const cancel = () => { this.editing = false; this.show(true); this.root.querySelector("button").focus(); };
    const send = () => { if (area.value.trim()) this.actions.edit(area.value); };
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
    });
    this.root.replaceChildren(el("div", { class: "edit" }, area, el("div", { class: "actions" },
      el("button", { type: "button", class: "button", text: "Cancel", on: { click: cancel } }),
      el("button", { type: "button", class: "button primary", text: "Send", on: { click: send } }))));
    area.focus();
    area.style.height = `${Math.min(area.scrollHeight + 4, innerHeight / 2)}px`;
  }
}

/** An answer; update() may be called often: it does its work at most once a frame. */
export class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.frame = 0;
    this.body = el("div", { class: "markdown" });
    this.waiting = el("div", { class: "waiting", "aria-hidden": "true" }, el("i"), el("i"), el("i"));
    this.calls = el("div");
    this.notice = el("div");
    this.tools = el("div", { class: "tools" });
    this.root = el("article", { class: "message assistant", "aria-label": "Answer" }, this.waiting, this.body, this.calls, this.notice, this.tools);
    this.markdown = new MarkdownView(this.body);
    this.reasoning = null;
    this.last = true;
    this.draw();
  }

  /** `last`: the answer may be made again. */
  show(last) {
    this.last = last;
    this.draw();
  }

  update() {
    if (this.message.state !== "streaming") return this.draw();
    this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { message } = this;
    const streaming = message.state === "streaming";
    this.root.setAttribute("aria-busy", String(streaming));
    this.waiting.hidden = !streaming || Boolean(message.content || message.reasoning || message.calls);
    this.drawReasoning(streaming);
    this.markdown.update(this.shownText(streaming), !streaming);
    if (message.calls) {
      this.calls.replaceChildren(...message.calls.filter(Boolean).map((call) => codeBlock(call.arguments, `call of ${call.name}`)));
    }
    this.drawNotice();
    this.tools.hidden = streaming;
    if (!streaming) this.drawTools();
    this.actions.drawn();
  }

  shownText(streaming) {
    const { message } = this;
    if (!message.request?.response_format || !message.content) return message.content;
    let text = message.content;
    if (!streaming) try { text = JSON.stringify(JSON.parse(text), null, 2); } catch { /* cut off: shown as it came */ }
    return "~".repeat(24) + `json\n${text}`; // a fence that no answer closes
  }

  drawReasoning(streaming) {
    const { message } = this;
    if (!message.reasoning) return;
    if (!this.reasoning) {
      const text = el("div", { class: "markdown" });
      const summary = el("summary");
      const details = el("details", { class: "reasoning" }, summary, text);
      this.reasoning = { summary, details, view: new MarkdownView(text) };
      // Not draw(), which follows the end of the answer: away from what was just opened.
      details.addEventListener("toggle", () => this.drawReasoning(this.message.state === "streaming"));
      this.body.before(details);
    }
    const thinking = streaming && !message.content;
    const took = message.thought_ms ? ` for ${ms(message.thought_ms)}` : "";
    this.reasoning.summary.textContent = thinking ? "Thinking…" : `Thought${took}`;
    // Folded reasoning costs nothing until it is opened.
    if (this.reasoning.details.open) this.reasoning.view.update(message.reasoning, !thinking);
  }

  drawNotice() {
    const { message } = this;
    this.notice.hidden = message.state !== "failed";
    if (!this.notice.hidden) {
      this.notice.className = "notice error";
      this.notice.replaceChildren(el("strong", { text: message.error.message }), message.error.advice);
    }
  }

  drawTools() {
    const { message } = this;
    const tools = [];
    if (message.content) tools.push(iconButton("copy", "Copy", (event) => copyFrom(event.currentTarget, message.content)));
    if (this.last) tools.push(iconButton("again", message.state === "failed" ? "Try again" : "Regenerate", () => this.actions.regenerate()));
    const stats = el("div", { class: "stats" }, ...statsOf(message).map(([text, title]) => el("span", { text, title })));
    this.tools.replaceChildren(...tools, stats);
  }
}
