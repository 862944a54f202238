// Conversations in localStorage: one entry each, so that two tabs do not overwrite each other's.

const PREFIX = "pelton.conversation.";

/**
 * A conversation: {id, created, updated, messages}. A message: {role, content} and, for answers,
 * {reasoning, calls, state: "streaming"|"done"|"stopped"|"failed", finish, error, request, stats}.
 */
export function newConversation() {
  const id = crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("");
  return { id, created: Date.now(), updated: Date.now(), messages: [] };
}

function parse(text) {
  try {
    const found = JSON.parse(text);
    if (typeof found?.id !== "string" || !Array.isArray(found.messages)) return null;
    if (!found.messages.every((message) => typeof message?.content === "string")) return null;
    // Nothing tells a tab that still writes an answer from one that is gone, and an answer must not stay open for ever.
    for (const message of found.messages) if (message.state === "streaming") message.state = "stopped";
    return found;
  } catch {
    return null;
  }
}

export class Conversations {
  constructor(storage) {
    this.storage = storage;
    this.all = new Map();
    this.load();
  }

  load() {
    this.all.clear();
    try {
      for (let i = 0; i < this.storage.length; i += 1) {
        const key = this.storage.key(i);
        if (!key.startsWith(PREFIX)) continue;
        const conversation = parse(this.storage.getItem(key));
        if (conversation) this.all.set(conversation.id, conversation);
      }
    } catch { /* storage is off: conversations live as long as the page */ }
  }

  /** Newest first. */
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.all.get(id) ?? null;
  }

  /** Takes over what another tab wrote. */
  refresh(key, text) {
    if (!key?.startsWith(PREFIX)) return false;
    const id = key.slice(PREFIX.length);
    const conversation = text === null ? null : parse(text);
    if (conversation) this.all.set(id, conversation);
    else this.all.delete(id);
    return true;
  }

  /** Returns false if the browser's storage is full. */
  save(conversation) {
    this.all.set(conversation.id, conversation);
    try {
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      return true;
    } catch {
      return false;
    }
  }

  remove(id) {
    this.all.delete(id);
    try { this.storage.removeItem(PREFIX + id); } catch { /* storage is off */ }
  }
}

/** The first words of the first message. */
export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0].replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 58).trimEnd()}…` : line || "New conversation";
}

/** What the model gets: answers that hold nothing are left out, questions in a row become one. */
export function requestMessages(messages, system) {
  const out = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of messages) {
    if (role === "assistant" && !content) continue;
    // Some chat templates refuse two messages of the user in a row, as they stand after a failed answer.
    if (role === out.at(-1)?.role) out.at(-1).content += `\n\n${content}`;
    else out.push({ role, content });
  }
  return out;
}

export function exportFile(conversation) {
  const name = titleOf(conversation).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40);
  const { created, updated, messages } = conversation;
  const text = JSON.stringify({
    format: "pelton-conversation", title: titleOf(conversation),
    created: new Date(created).toISOString(), updated: new Date(updated).toISOString(), messages,
  }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `${name || "conversation"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
