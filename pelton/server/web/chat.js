// The chat page: which conversation is shown, what is sent, and the keys.
import { ApiError, request } from "./api.js";
import { Conversations, exportFile, newConversation, requestMessages, titleOf } from "./conversations.js";
import { announce, byId, el, iconButton } from "./dom.js";
import { count } from "./format.js";
import { Generation } from "./generation.js";
import { AnswerView, QuestionView } from "./messages.js";
import { Parameters } from "./parameters.js";

const EXAMPLES = [
  "Explain how a key-value cache makes decoding faster.",
  "Write a Python function that merges overlapping intervals, with tests.",
  "Compare Pelton, Francis and Kaplan turbines in a table.",
];
const narrow = matchMedia("(max-width: 760px)");
const overlaid = matchMedia("(max-width: 1080px)"); // the parameters cover the page

const allowed = (get) => { try { return get(); } catch { return null; } }; // a browser may forbid storage
const storage = allowed(() => localStorage);
const store = new Conversations(storage);
const running = new Map(); // conversation id -> Generation
let current = newConversation();
let views = [];
// For a model that recommends nothing itself: what `pelton run` has. OpenAI's 1 lets small models ramble.
const RECOMMENDED = { temperature: 0.7, top_p: 0.95 };
let models = [];
let removed = null; // the last deleted conversation, for undo

const thread = byId("thread");
const prompt = byId("prompt");
const parameters = new Parameters(showMode);

// Scrolling: follow the answer only if the reader is at the end.

let following = true;
let scrolled = 0;
const atEnd = () => thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;

thread.addEventListener("scroll", () => {
  if (thread.scrollTop < scrolled - 1) following = atEnd();
  else if (!following) following = atEnd();
  scrolled = thread.scrollTop;
  byId("bar").classList.toggle("scrolled", scrolled > 4);
  showLatest();
}, { passive: true });

function follow(force = false) {
  if (force) following = true;
  if (following) thread.scrollTop = thread.scrollHeight;
  showLatest();
}

function showLatest() {
  byId("latest").hidden = following || atEnd();
}

// Conversations

function open(conversation) {
  current = conversation;
  say("");
  history.replaceState(null, "", current.messages.length ? `#${current.id}` : location.pathname);
  byId("messages").replaceChildren();
  views = [];
  for (const message of current.messages) addView(message);
  showLast();
  showList();
  showState();
  follow(true);
}

/** Shows what another tab wrote. What did not change keeps its nodes, so that an edit or the place of reading is not lost. */
function takeOver(conversation) {
  current = conversation;
  const { messages } = current;
  const top = thread.scrollTop;
  const changed = views.findIndex((view, index) => JSON.stringify(view.message) !== JSON.stringify(messages[index]));
  if (changed >= 0) for (const view of views.splice(changed)) view.root.remove();
  views.forEach((view, index) => { view.message = messages[index]; });
  for (const message of messages.slice(views.length)) addView(message);
  showLast();
  showList();
  showState();
  if (!following) thread.scrollTop = top;
}

function addView(message) {
  const actions = {
    edit: (text) => editLast(text),
    regenerate: () => regenerate(),
    drawn: () => follow(),
  };
  const view = message.role === "user" ? new QuestionView(message, actions) : new AnswerView(message, actions);
  views.push(view);
  byId("messages").append(view.root);
  return view;
}

/** Only the last question and the last answer can be changed, and not while an answer comes. */
function showLast() {
  const idle = !running.has(current.id);
  const question = views.findLast((view) => view instanceof QuestionView);
  for (const view of views) {
    const last = idle && (view === question || view === views.at(-1));
    if (view instanceof QuestionView || view.message.state !== "streaming") view.show(last);
  }
}

function showList() {
  const list = byId("conversations");
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  list.replaceChildren(...store.list().map((conversation) => {
    const name = titleOf(conversation);
    const here = conversation.id === current.id;
    return el("li", { "data-id": conversation.id, class: [here ? "current" : "", running.has(conversation.id) ? "running" : ""].join(" ").trim() },
      el("button", { type: "button", class: "open", text: name, title: name, "aria-current": here ? "true" : null,
        on: { click: () => { open(conversation); closePanels(); if (!narrow.matches) prompt.focus(); } } }),
      iconButton("trash", `Delete “${name}”`, () => remove(conversation)));
  }));
  if (removed) {
    list.append(el("li", { "data-id": removed.id }, el("button", { type: "button", class: "open", text: "Deleted. Undo", on: { click: () => {
      const back = removed;
      removed = null;
      store.save(back);
      open(back);
    } } })));
  }
  if (!focused) return;
  const item = [...list.children].find(({ dataset }) => dataset.id === focused.parentElement.dataset.id);
  const button = item?.querySelector(focused.matches(".open") ? ".open" : ".icon-button") ?? item?.firstElementChild;
  (button ?? byId("new")).focus();
}

function remove(conversation) {
  running.get(conversation.id)?.stop();
  store.remove(conversation.id);
  removed = conversation;
  announce("Conversation deleted");
  setTimeout(() => { if (removed === conversation) { removed = null; showList(); } }, 10_000);
  if (conversation.id === current.id) open(newConversation());
  else showList();
}

function save(conversation) {
  if (!store.save(conversation)) {
    say("The browser stores no more: this conversation will not survive a reload. Delete old ones.");
  }
}

// Sending

function say(problem) {
  byId("problem").textContent = problem;
}

/** Whether a request can be made now; says what is in its way. Asked before anything of the conversation changes. */
function ready() {
  const problem = parameters.check(true);
  say(problem || (models.length ? "" : "The server's models are not known yet. Reload the page once the server runs."));
  if (problem && byId("settings").hidden) toggleSettings(true);
  return !problem && models.length > 0;
}

function send(text) {
  if (running.has(current.id) || !text.trim() || !ready()) return false;
  ask(text);
  return true;
}

function ask(text) {
  current.messages.push({ role: "user", content: text });
  addView(current.messages.at(-1));
  answer();
}

function answer() {
  const conversation = current;
  const body = { model: chosenModel(), ...recommended(), ...parameters.body() };
  const system = parameters.system;
  const message = { role: "assistant", content: "", state: "streaming", request: { ...body, ...(system && { system }) } };
  body.messages = requestMessages(conversation.messages, system);
  conversation.messages.push(message);
  conversation.updated = Date.now();
  addView(message);

  let saved = performance.now();
  const generation = new Generation(message, body, () => {
    views.find((view) => view.message === message)?.update();
    if (message.state === "streaming" && performance.now() - saved > 2000) {
      save(conversation);
      saved = performance.now();
    }
  });
  running.set(conversation.id, generation);
  save(conversation);
  history.replaceState(null, "", `#${conversation.id}`);
  showLast();
  showList();
  showState();
  follow(true);
  announce("Answering");
  generation.run().then(() => {
    running.delete(conversation.id);
    if (store.get(conversation.id)) save(conversation);
    showList();
    if (conversation !== current) return;
    showLast();
    showState();
    announce({ done: "Answer finished", stopped: "Stopped", failed: `Error: ${message.error?.message}` }[message.state]);
  });
}

function dropLastAnswer() {
  while (current.messages.at(-1)?.role === "assistant") {
    current.messages.pop();
    views.pop().root.remove();
  }
}

function regenerate() {
  if (!ready()) return;
  dropLastAnswer();
  answer();
  prompt.focus();
}

function editLast(text) {
  if (!ready()) return;
  dropLastAnswer();
  current.messages.pop();
  views.pop().root.remove();
  ask(text);
  prompt.focus();
}

// Models

function chosenModel() {
  return models.length > 1 ? byId("model").value : models[0].id;
}

function recommended() {
  const { sampling_defaults: own } = models.find(({ id }) => id === chosenModel()) ?? {};
  return own && Object.keys(own).length === 0 ? RECOMMENDED : {};
}

async function loadModels() {
  try {
    const { data } = await (await request("/v1/models")).json();
    models = data;
  } catch (error) {
    const known = error instanceof ApiError ? error : new ApiError(500, `The list of models cannot be read (${error.message}).`);
    byId("about").replaceChildren(el("span", { class: "notice error" }, el("strong", { text: known.message }), known.advice));
    byId("examples").replaceChildren(el("button", { type: "button", text: "Try again", on: { click: () => loadModels() } }));
    return;
  }
  const select = byId("model");
  const before = select.value || allowed(() => sessionStorage.getItem("pelton.model"));
  select.replaceChildren(...models.map(({ id }) => el("option", { value: id, text: id, selected: id === before })));
  const several = models.length > 1;
  select.hidden = document.querySelector("label[for=model]").hidden = !several;
  byId("model-name").hidden = several;
  byId("model-name").textContent = byId("model-name").title = several ? "" : models[0]?.id ?? "";
  showModel();
  byId("examples").replaceChildren(...EXAMPLES.map((text) => el("button", { type: "button", text, on: { click: () => send(text) } })));
}

function showModel() {
  const model = models.find(({ id }) => id === chosenModel());
  byId("greeting").textContent = `Chat with ${model.id.split("/").at(-1)}`;
  byId("about").textContent = model.max_model_len
    ? `Runs on this server with ${count(model.max_model_len)} tokens of context. Conversations stay in this browser.`
    : "Runs on this server. Conversations stay in this browser.";
  showState();
}

// State of the page

function showState() {
  const busy = running.has(current.id);
  const last = current.messages.at(-1);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("send").disabled = !prompt.value.trim();
  byId("empty").hidden = current.messages.length > 0;
  byId("export").disabled = current.messages.length === 0;
  byId("title").textContent = titleOf(current);
  document.title = current.messages.length ? `${titleOf(current)} · Pelton` : "Pelton";
  const limit = models.find(({ id }) => id === last?.request?.model)?.max_model_len;
  const used = (last?.stats?.prompt_tokens ?? 0) + (last?.stats?.completion_tokens ?? 0);
  byId("context").textContent = used && limit ? `${count(used)} of ${count(limit)} tokens of context` : "";
  showMode();
}

function showMode() {
  byId("mode").hidden = parameters.format === "text";
  byId("mode").textContent = parameters.format === "json" ? "JSON" : "JSON by schema";
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  byId("send").disabled = !prompt.value.trim();
}

function toggleSettings(open, focus = true) {
  byId("settings").hidden = !open;
  byId("open-settings").setAttribute("aria-expanded", String(open));
  allowed(() => storage.setItem("pelton.panel", open && !overlaid.matches ? "open" : ""));
  cover();
  if (focus) (open ? byId("close-settings") : byId("open-settings")).focus();
}

function toggleSidebar(open) {
  byId("sidebar").classList.toggle("open", open);
  byId("close-sidebar").hidden = !open;
  byId("open-sidebar").setAttribute("aria-expanded", String(open));
  cover();
  if (open) byId("close-sidebar").focus();
}

function cover() {
  const settings = overlaid.matches && !byId("settings").hidden;
  const covered = settings || (narrow.matches && byId("sidebar").classList.contains("open"));
  byId("scrim").hidden = !covered;
  byId("middle").inert = covered;
  byId("sidebar").inert = settings;
}

function closePanels() {
  let closed = false;
  if (byId("sidebar").classList.contains("open")) { toggleSidebar(false); byId("open-sidebar").focus(); closed = true; }
  if (overlaid.matches && !byId("settings").hidden) { toggleSettings(false); closed = true; }
  return closed;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (send(prompt.value)) {
    prompt.value = "";
    grow();
  }
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || byId("key-dialog")) return;
  if (!closePanels()) running.get(current.id)?.stop();
});
byId("stop").addEventListener("click", () => { running.get(current.id)?.stop(); prompt.focus(); });
byId("new").addEventListener("click", () => { open(newConversation()); closePanels(); prompt.focus(); });
byId("latest").addEventListener("click", () => follow(true));
byId("export").addEventListener("click", () => exportFile(current));
byId("model").addEventListener("change", () => {
  allowed(() => sessionStorage.setItem("pelton.model", byId("model").value));
  showModel();
});
byId("mode").addEventListener("click", () => toggleSettings(true));
byId("open-settings").addEventListener("click", () => toggleSettings(byId("settings").hidden));
byId("close-settings").addEventListener("click", () => toggleSettings(false));
byId("open-sidebar").addEventListener("click", () => toggleSidebar(true));
byId("close-sidebar").addEventListener("click", closePanels);
byId("scrim").addEventListener("click", closePanels);
for (const query of [narrow, overlaid]) query.addEventListener("change", cover);
new ResizeObserver(() => follow()).observe(thread);
addEventListener("pagehide", () => { for (const id of running.keys()) if (store.get(id)) store.save(store.get(id)); });
addEventListener("hashchange", () => {
  const conversation = store.get(location.hash.slice(1));
  if (conversation && conversation !== current) open(conversation);
});
addEventListener("storage", (event) => {
  if (event.key && running.has(event.key.split(".").at(-1))) return; // this tab writes that one
  if (!store.refresh(event.key, event.newValue)) return;
  const fresh = store.get(current.id);
  if (fresh && fresh !== current) takeOver(fresh);
  else showList();
});

if (storage?.getItem("pelton.panel") && !overlaid.matches) toggleSettings(true, false);
open(store.get(location.hash.slice(1)) ?? current);
if (!narrow.matches) prompt.focus(); // on a phone the keyboard would cover the page
loadModels();
