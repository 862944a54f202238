// Markdown to a tree of plain objects. The subset that language models write: CommonMark's blocks and inlines
// (without raw HTML, references and `---` under a line as a heading) and the tables, task lists, strikethrough and
// bare links of GitHub. No DOM here; markdown_view.js builds the nodes.

const FENCE = /^[ \t]{0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const MARKER = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const DELIMITER_ROW = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MAX_DEPTH = 16; // deeper nesting is text: recursion stays bounded

const blank = (line) => /^\s*$/.test(line);

function indentOf(line) {
  let columns = 0;
  for (const char of line) {
    if (char === " ") columns += 1;
    else if (char === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

/** The line without its first `columns` columns of white space. */
function strip(line, columns) {
  let at = 0;
  let column = 0;
  while (at < line.length && column < columns) {
    if (line[at] === " ") column += 1;
    else if (line[at] === "\t") column += 4 - (column % 4);
    else break;
    at += 1;
  }
  return " ".repeat(Math.max(0, column - columns)) + line.slice(at);
}

function marker(line) {
  const found = MARKER.exec(line);
  if (!found || RULE.test(line)) return null;
  const indent = indentOf(found[1]);
  const space = found[3] ? indentOf(found[3]) : 1;
  const ordered = found[2].length > 1;
  return {
    indent, ordered,
    kind: found[2].at(-1),
    number: ordered ? parseInt(found[2], 10) : 1,
    width: indent + found[2].length + (space > 4 ? 1 : space),
    rest: (space > 4 ? " ".repeat(space - 1) : "") + (found[4] ?? ""),
  };
}

/** Whether the line begins a block that ends the paragraph before it. */
function interrupts(line) {
  if (HEADING.test(line) || FENCE.test(line) || QUOTE.test(line) || RULE.test(line)) return true;
  const found = marker(line);
  return found !== null && found.indent < 4 && found.rest !== "" && (!found.ordered || found.number === 1);
}

/** Blocks of the text; each has `start`, the offset in the text where its first line begins. */
export function parse(text) {
  const lines = text.split("\n");
  const offsets = [0];
  for (const line of lines) offsets.push(offsets.at(-1) + line.length + 1);
  const blocks = parseLines(lines.map((line) => line.replace(/\r$/, "")), 0);
  for (const block of blocks) block.start = offsets[block.line];
  return blocks;
}

function parseLines(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) { at += 1; continue; }
    const [block, next] = parseBlock(lines, at, depth);
    block.line = at;
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function parseBlock(lines, at, depth) {
  const line = lines[at];
  if (indentOf(line) >= 4) return parseIndented(lines, at);
  let found;
  if ((found = FENCE.exec(line))) return parseFence(lines, at, found);
  if ((found = HEADING.exec(line))) return [{ type: "heading", level: found[1].length, text: found[2] ?? "" }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return parseQuote(lines, at, depth);
  if (depth < MAX_DEPTH && marker(line)) return parseList(lines, at, depth);
  if (isTable(lines, at)) return parseTable(lines, at);
  return parseParagraph(lines, at);
}

function parseIndented(lines, at) {
  const code = [];
  for (; at < lines.length && (blank(lines[at]) || indentOf(lines[at]) >= 4); at += 1) code.push(strip(lines[at], 4));
  while (code.length && blank(code.at(-1))) code.pop();
  return [{ type: "code", language: "", text: code.join("\n") }, at];
}

function parseFence(lines, at, [, fence, info]) {
  const indent = indentOf(lines[at]);
  const end = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
  const code = [];
  let closed = false;
  for (at += 1; at < lines.length && !closed; at += 1) {
    closed = end.test(lines[at]);
    if (!closed) code.push(strip(lines[at], indent));
  }
  return [{ type: "code", language: info.trim().split(/\s+/)[0], text: code.join("\n") }, at];
}

function parseQuote(lines, at, depth) {
  const inner = [];
  for (; at < lines.length; at += 1) {
    const quoted = QUOTE.exec(lines[at]);
    if (quoted) inner.push(lines[at].slice(quoted[0].length));
    else if (!blank(lines[at]) && !blank(inner.at(-1)) && !interrupts(lines[at]) && !marker(lines[at])) inner.push(lines[at]);
    else break;
  }
  return [{ type: "quote", blocks: parseLines(inner, depth + 1) }, at];
}

function parseList(lines, at, depth) {
  const first = marker(lines[at]);
  const items = [];
  let loose = false;
  for (let item; at < lines.length && (item = marker(lines[at])); ) {
    if (item.kind !== first.kind || item.indent >= 4) break;
    const body = [item.rest];
    let gap = false;
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      if (blank(line)) {
        if (gap && body.every(blank)) break;
        gap = true;
        body.push("");
        continue;
      }
      const indent = indentOf(line);
      const inside = marker(line);
      // Models often indent a nested list by two columns where the marker above is three wide.
      if (indent >= item.width || (inside && indent >= item.indent + 2)) body.push(strip(line, Math.min(indent, item.width)));
      else if (!gap && !inside && !interrupts(line)) body.push(line.trimStart());
      else break;
      gap = false;
    }
    const last = at >= lines.length;
    while (body.length > 1 && blank(body.at(-1))) body.pop();
    const next = last ? null : marker(lines[at]);
    const task = /^\[([ xX])\](?:[ \t]+|$)/.exec(body[0]);
    if (task) body[0] = body[0].slice(task[0].length);
    const blocks = parseLines(body, depth + 1);
    if ((gap && next && next.kind === first.kind) || (blocks.length > 1 && body.some(blank) && blocks[1].type === "paragraph")) loose = true;
    items.push({ blocks, checked: task ? task[1] !== " " : null });
  }
  return [{ type: "list", ordered: first.ordered, number: first.number, loose, items }, at];
}

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function isTable(lines, at) {
  return at + 1 < lines.length && lines[at].includes("|") && DELIMITER_ROW.test(lines[at + 1])
    && lines[at + 1].includes("-") && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function parseTable(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return left && right ? "center" : right ? "right" : "left";
  });
  const rows = [];
  for (at += 2; at < lines.length && !blank(lines[at]) && !interrupts(lines[at]); at += 1) {
    const row = cells(lines[at]).slice(0, head.length);
    while (row.length < head.length) row.push("");
    rows.push(row);
  }
  return [{ type: "table", head, align, rows }, at];
}

function parseParagraph(lines, at) {
  const text = [lines[at].trim()];
  for (at += 1; at < lines.length && !blank(lines[at]); at += 1) {
    if (/^ {0,3}=+[ \t]*$/.test(lines[at])) return [{ type: "heading", level: 1, text: text.join("\n") }, at + 1];
    if (interrupts(lines[at]) || isTable(lines, at)) break;
    text.push(lines[at].trim());
  }
  return [{ type: "paragraph", text: text.join("\n") }, at];
}

// Inlines

const PLAIN = /[^\\`*_~[\]!<&h\n]+/y;
const ENTITIES = { __proto__: null, amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", mdash: "—", ndash: "–", hellip: "…" };
const ENTITY = /&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([a-zA-Z]{2,8}));/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BREAK = /<br[ \t]*\/?>/iy;
const BARE = /https?:\/\/[^\s<>"`\]]+/y;
const TARGET = /\([ \t\n]*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*))(?:[ \t\n]+(?:"[^"]*"|'[^']*'))?[ \t\n]*\)/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** The address if it may be followed from an answer: http, https and mailto only. Otherwise null. */
export function safeUrl(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/**
 * Inline nodes: {type: text|code|em|strong|del|link|break, text|children|href}. With `open`, the text still grows:
 * strong text and code that have not ended yet are shown as such, so that a reader does not see marks come and go.
 */
export function inlines(text, open = false) {
  if (open) text = text.replace(/\[([^[\]\n]{1,200})\]\([^()\s]{0,2000}$/, "$1").replace(/(^|\s)(?:\*{1,3}|~~?)$/, "$1");
  const out = [];
  const openers = []; // of emphasis: {char, count, at: index in out}
  const brackets = []; // {at: index in out, height: openers then, image}
  const floor = new Map(); // per closer: openers below this height are known not to fit
  const noTicks = new Set(); // lengths of backtick runs without an end
  let plain = "";
  const flush = () => { if (plain) out.push({ type: "text", text: plain }); plain = ""; };

  let at = 0;
  while (at < text.length) {
    let found = match(PLAIN, text, at);
    if (found) { plain += found[0]; at = PLAIN.lastIndex; continue; }
    const char = text[at];
    if (char === "\\" && at + 1 < text.length && /[!-/:-@[-`{-~]/.test(text[at + 1])) { plain += text[at + 1]; at += 2; continue; }
    if (char === "\n" || (char === "<" && (found = match(BREAK, text, at)))) {
      plain = plain.replace(/[ \\]+$/, "");
      flush();
      out.push({ type: "break" });
      at += char === "\n" ? 1 : found[0].length;
      continue;
    }
    if (char === "`") { at = ticks(at); continue; }
    if (char === "*" || char === "_" || char === "~") { at = delimiter(at); continue; }
    if (char === "[" || (char === "!" && text[at + 1] === "[")) {
      flush();
      brackets.push({ at: out.length, height: openers.length, image: char === "!" });
      plain = char === "!" ? "![" : "[";
      flush();
      at += char === "!" ? 2 : 1;
      continue;
    }
    if (char === "]") { at = bracket(at); continue; }
    if (char === "&" && (found = match(ENTITY, text, at))) {
      const code = found[1] ? parseInt(found[1], 10) : found[2] ? parseInt(found[2], 16) : 0;
      plain += found[3] ? ENTITIES[found[3]] ?? found[0] : code > 0 && code < 0x110000 ? String.fromCodePoint(code) : found[0];
      at += found[0].length;
      continue;
    }
    if (char === "<" && (found = match(ANGLE, text, at))) {
      flush();
      out.push(link(found[1], [{ type: "text", text: found[1] }]));
      at += found[0].length;
      continue;
    }
    if (char === "h" && !/\w$/.test(plain) && (found = match(BARE, text, at))) {
      const address = trimmed(found[0]);
      if (address.length > 8) {
        flush();
        out.push(link(address, [{ type: "text", text: address }]));
        at += address.length;
        continue;
      }
    }
    plain += char;
    at += 1;
  }
  flush();
  if (open) closeStrong();
  return out;

  function link(href, children) {
    return { ...marked("link", children), href };
  }

  function ticks(from) {
    let to = from;
    while (text[to] === "`") to += 1;
    const run = to - from;
    if (!noTicks.has(run)) {
      const end = new RegExp(`(?<!\`)\`{${run}}(?!\`)`, "g");
      end.lastIndex = to;
      const found = end.exec(text);
      if (found || (open && to < text.length)) {
        let code = text.slice(to, found ? found.index : undefined).replaceAll("\n", " ");
        if (code.trim() && code.startsWith(" ") && code.endsWith(" ")) code = code.slice(1, -1);
        flush();
        out.push({ type: "code", text: code });
        return found ? found.index + run : text.length;
      }
      noTicks.add(run);
    }
    plain += text.slice(from, to);
    return to;
  }

  function delimiter(from) {
    const char = text[from];
    let to = from;
    while (text[to] === char) to += 1;
    let count = to - from;
    const before = from ? text[from - 1] : " ";
    const after = to < text.length ? text[to] : " ";
    const spaceBefore = /\s/.test(before), spaceAfter = /\s/.test(after);
    const markBefore = PUNCTUATION.test(before), markAfter = PUNCTUATION.test(after);
    const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
    const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
    const canOpen = char === "_" ? left && (!right || markBefore) : left;
    const canClose = char === "_" ? right && (!left || markAfter) : right;
    if (char === "~" && count !== 2) { plain += text.slice(from, to); return to; }
    flush();
    while (canClose && count > 0) {
      const key = `${char}${canOpen}${count % 3}`;
      let k = openers.length - 1;
      const lowest = floor.get(key) ?? 0;
      const fits = (opener) => opener.char === char
        && !((opener.both || canOpen) && (opener.total + count) % 3 === 0 && (opener.total % 3 || count % 3) && char !== "~");
      while (k >= lowest && !fits(openers[k])) k -= 1;
      if (k < lowest) { floor.set(key, openers.length); break; }
      const opener = openers[k];
      openers.length = k + 1;
      while (brackets.length && brackets.at(-1).at > opener.at) brackets.pop();
      const used = count >= 2 && opener.count >= 2 ? 2 : 1;
      const children = out.splice(opener.at + 1);
      opener.count -= used;
      count -= used;
      if (opener.count) out[opener.at].text = char.repeat(opener.count);
      else { out.pop(); openers.pop(); }
      for (const [name, height] of floor) if (height > openers.length) floor.set(name, openers.length);
      out.push(marked(char === "~" ? "del" : used === 2 ? "strong" : "em", children));
    }
    if (count) {
      out.push({ type: "text", text: char.repeat(count) });
      if (canOpen) openers.push({ char, count, total: count, both: canClose, at: out.length - 1 });
    }
    return to;
  }

  function bracket(from) {
    flush();
    const opener = brackets.pop();
    const found = opener && match(TARGET, text, from + 1);
    if (!found) { plain += "]"; return from + 1; }
    const children = unlinked(out.splice(opener.at).slice(1));
    openers.length = Math.min(openers.length, opener.height);
    for (const [name, height] of floor) if (height > openers.length) floor.set(name, openers.length);
    const href = (found[1] ?? found[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
    // A picture would be a request to another host: it is shown as a link to follow.
    out.push(link(href, children.length ? children : [{ type: "text", text: href }]));
    if (!opener.image) brackets.length = 0; // links do not nest
    return from + 1 + found[0].length;
  }

  function closeStrong() {
    const opener = openers.findLast((one) => one.char === "*" && one.count === 2 && one.at < out.length - 1);
    if (!opener) return;
    const children = out.splice(opener.at).slice(1);
    out.push(marked("strong", children));
  }
}

/** A node around others; their mere text where marks are nested too deeply. */
function marked(type, children) {
  const depth = 1 + children.reduce((most, child) => Math.max(most, child.depth ?? 0), 0);
  return depth <= MAX_DEPTH ? { type, children, depth } : { type: "text", text: children.map(textOf).join("") };
}

function textOf(node) {
  return node.text ?? node.children?.map(textOf).join("") ?? " ";
}

/** The nodes with links replaced by what they hold: links do not nest. */
function unlinked(nodes) {
  return nodes.flatMap((node) => {
    if (node.type === "link") return node.children;
    return node.children ? { ...node, children: unlinked(node.children) } : node;
  });
}

/** A bare address without the marks of the sentence around it. */
function trimmed(address) {
  let unopened = address.split(")").length - address.split("(").length;
  let end = address.length;
  for (; ; end -= 1) {
    const last = address[end - 1];
    if (last === ")" && unopened > 0) unopened -= 1;
    else if (!/[.,:;!?'*_~]/.test(last)) return address.slice(0, end);
  }
}
