// Shows markdown that grows. Text of a model only ever becomes text nodes; addresses pass safeUrl.
import { el, copyFrom } from "./dom.js";
import { inlines, parse, safeUrl } from "./markdown.js";

const MARKS = { em: "em", strong: "strong", del: "del" };

function inlineNodes(text, open) {
  const build = (node) => {
    if (node.type === "text") return document.createTextNode(node.text);
    if (node.type === "code") return el("code", { text: node.text });
    if (node.type === "break") return el("br");
    if (node.type === "link") {
      const href = safeUrl(node.href);
      const link = href === null ? el("span") : el("a", { href, rel: "noopener noreferrer", target: "_blank" });
      link.append(...node.children.map(build));
      return link;
    }
    return el(MARKS[node.type], {}, ...node.children.map(build));
  };
  return inlines(text, open).map(build);
}

/** A block of code with its language and a copy button. */
export function codeBlock(text, language) {
  return el("div", { class: "code-block" },
    el("div", { class: "code-head" },
      el("span", { text: language || "text" }),
      el("button", { type: "button", class: "copy-code", "aria-label": "Copy code", text: "Copy" })),
    el("pre", { tabindex: "0" }, el("code", { text })));
}

function blockNode(block, open) {
  switch (block.type) {
    case "heading": // the page's own headings are h1 and h2
      return el(`h${Math.min(6, block.level + 2)}`, { class: `h-${block.level}` }, ...inlineNodes(block.text, open));
    case "rule": return el("hr");
    case "code": return codeBlock(block.text, block.language);
    case "quote": return el("blockquote", {}, ...blockNodes(block.blocks, open));
    case "list": return listNode(block, open);
    case "table": return tableNode(block, open);
    default: return el("p", {}, ...inlineNodes(block.text, open));
  }
}

function blockNodes(blocks, open) {
  return blocks.map((block, index) => blockNode(block, open && index === blocks.length - 1));
}

function listNode(list, open) {
  const node = el(list.ordered ? "ol" : "ul", { class: list.loose ? "loose" : null });
  if (list.ordered && list.number !== 1) node.setAttribute("start", list.number);
  list.items.forEach((item, index) => {
    const grows = open && index === list.items.length - 1;
    const li = el("li");
    if (item.checked !== null) {
      li.className = "task";
      li.append(el("input", { type: "checkbox", disabled: true, checked: item.checked, "aria-label": item.checked ? "done" : "open" }));
    }
    item.blocks.forEach((block, at) => {
      const last = grows && at === item.blocks.length - 1;
      if (block.type === "paragraph" && !list.loose) li.append(...inlineNodes(block.text, last));
      else li.append(blockNode(block, last));
    });
    node.append(li);
  });
  return node;
}

function tableNode(table, open) {
  const row = (tag, texts, grows) => el("tr", {}, ...texts.map((text, column) => el(tag, {
    class: table.align[column] === "left" ? null : table.align[column], scope: tag === "th" ? "col" : null,
  }, ...inlineNodes(text, grows))));
  const last = table.rows.length - 1;
  return el("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table" }, el("table", {},
    el("thead", {}, row("th", table.head, false)),
    el("tbody", {}, ...table.rows.map((cells, index) => row("td", cells, open && index === last)))));
}

/** Makes `old` equal to `fresh` and keeps the nodes that did not change: selection and scrolling survive. */
function morph(old, fresh) {
  if (old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) {
      if (fresh.data.length > old.data.length) old.appendData(fresh.data.slice(old.data.length));
    } else old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  morphChildren(old, [...fresh.childNodes], old.firstChild);
}

/** Makes the children from `old` on equal to `fresh`. */
function morphChildren(parent, fresh, old) {
  for (const node of fresh) {
    const next = old?.nextSibling;
    if (old) morph(old, node);
    else parent.append(node);
    old = next;
  }
  for (let next; old; old = next) {
    next = old.nextSibling;
    old.remove();
  }
}

/** Markdown inside `root`. update() costs as much as the last two blocks, not as the whole text. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.settled = null; // the last of the nodes that cannot change any more
    this.offset = 0; // where in the text the block after it begins
    root.addEventListener("click", (event) => {
      const button = event.target.closest?.(".copy-code");
      if (button) copyFrom(button, button.closest(".code-block").querySelector("code").textContent);
    });
  }

  /** Shows `text`; `done` says that no more follows. */
  update(text, done = false) {
    // Much faster than startsWith, which compares character by character.
    if (text.slice(0, this.text.length) !== this.text) [this.settled, this.offset] = [null, 0];
    this.text = text;
    const blocks = parse(text.slice(this.offset));
    const next = () => (this.settled ? this.settled.nextSibling : this.root.firstChild);
    morphChildren(this.root, blockNodes(blocks, !done), next());
    // A line that is still being written can only change the last block and, by joining it, the one before.
    const keep = blocks.length - 2;
    for (let i = 0; i < keep; i += 1) this.settled = next();
    if (keep > 0) this.offset += blocks[keep].start;
  }
}
