// Requests to the server: the API key, and errors that say what to do.
import { el } from "./dom.js";

const KEY = "pelton.key";
let key = null;
let asking = null;
try { key = sessionStorage.getItem(KEY); } catch { /* storage is off: the key holds for this page only */ }

/** An error of a request: `status` is 0 if no answer came. `advice` says what the reader can do. */
export class ApiError extends Error {
  constructor(status, message, code = null, advice = null) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.advice = advice ?? adviceFor(status, code, message);
  }
}

function adviceFor(status, code, message) {
  if (status === 0) return "Check that the server still runs and that this machine reaches it, then try again.";
  if (status === 401 || status === 403) return "Enter the API key that the server was started with.";
  if (status === 404) return "Reload the page to read the list of models again.";
  if (status === 413 || /context|max_model_len|too long/i.test(`${code ?? ""} ${message}`)) {
    return "Shorten the message, lower max_tokens, or start a new conversation.";
  }
  if (status === 400 || status === 422) return "Change the parameter that the message names, then regenerate.";
  if (status === 429) return "The server has more requests than it accepts. Wait a moment, then regenerate.";
  if (status === 503) return "The model is still loading or the server is shutting down. Try again in a few seconds.";
  return "Try again. If it comes back, the server's log has the cause.";
}

/** Asks for the key once, however many requests wait for it. Resolves to false if the reader declines. */
function askForKey(tried) {
  asking ??= new Promise((resolve) => {
    const input = el("input", { id: "key-input", type: "password", autocomplete: "off", spellcheck: "false",
      "aria-invalid": String(tried), "aria-describedby": "key-problem" });
    const dialog = el("dialog", { id: "key-dialog", "aria-labelledby": "key-title" }, el("form", { method: "dialog" },
      el("h2", { id: "key-title", text: "API key" }),
      el("p", { class: "hint", text: "This server asks for a key. It stays in this tab and is forgotten when the tab closes." }),
      el("label", { for: "key-input", text: "Key" }), input,
      el("p", { class: "problem", id: "key-problem", role: "alert", text: tried ? "The server did not accept that key." : "" }),
      el("div", { class: "actions" },
        el("button", { class: "button", id: "key-cancel", type: "button", text: "Cancel", on: { click: () => dialog.close() } }),
        el("button", { class: "button primary", value: "save", text: "Continue" }))));
    dialog.addEventListener("close", () => {
      asking = null;
      dialog.remove();
      const typed = input.value.trim();
      if (dialog.returnValue !== "save" || !typed) return resolve(false);
      key = typed;
      try { sessionStorage.setItem(KEY, key); } catch { /* it holds for this page only */ }
      resolve(true);
    });
    document.body.append(dialog);
    dialog.showModal();
    input.focus();
  });
  return asking;
}

/** fetch with the key; asks for one on 401 and repeats the request. Throws ApiError, or AbortError on abort. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const tried = key;
    const headers = {};
    if (tried) headers.Authorization = `Bearer ${tried}`;
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, cache: "no-store",
        body: body ? JSON.stringify(body) : undefined });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server does not answer.");
    }
    if (response.ok) return response;
    const error = await readError(response);
    if (response.status !== 401) throw error;
    // Another request may have got a new key meanwhile: use that one before asking again.
    if (tried === key && !(await askForKey(Boolean(tried)))) throw error;
    signal?.throwIfAborted();
  }
}

async function readError(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  let code = null;
  try {
    const { error } = await response.json();
    if (typeof error?.message === "string") message = error.message;
    code = error?.code ?? null;
  } catch { /* a proxy in between may answer without JSON */ }
  const after = response.headers.get("Retry-After");
  const advice = response.status === 429 && /^\d+$/.test(after ?? "")
    ? `The server has more requests than it accepts. Try again in ${after} s.` : null;
  return new ApiError(response.status, message, code, advice);
}

/** The error that came inside a stream. */
export function streamError(error) {
  const status = Number.isInteger(error?.code) ? error.code : 500;
  return new ApiError(status, error?.message ?? "The server ended the answer with an error.", error?.code ?? null);
}
