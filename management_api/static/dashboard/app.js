// Puts the page together: the stream and the replies go into the model, the model is drawn once a frame.

import * as api from "./api.js";
import { Model } from "./model.js";
import { filesOf, lists, Page } from "./page.js";
import { Stream } from "./stream.js";
import { html, render } from "./ui.js";
import { nameOf, plural } from "./words.js";

const REREAD_MS = 5000; // positions and times move; requests are limited
const QUEUE_ROWS = 1000;
const TOAST_MS = 8000;

const root = document.getElementById("app");
const announcer = document.getElementById("announcer");
const model = new Model();
const view = {
  known: api.key.get() !== null,
  keyProblem: null,
  connection: { connected: false, first: true },
  toasts: [],
  dialog: null,
  dragging: false,
  theme: theme(),
  now: Date.now(),
  lists: lists(model),
  gpuError: null,
};

// ---- drawing

let due = false;
let stale = true;

// Something changed; `rows`: also which workflows there are, or how they stand.
function changed(rows = true) {
  stale ||= rows;
  if (due) return;
  due = true;
  requestAnimationFrame(draw);
}

function draw() {
  due = false;
  if (stale) {
    const fresh = lists(model);
    for (const name in fresh) if (!same(view.lists[name], fresh[name])) view.lists = { ...view.lists, [name]: fresh[name] };
    stale = false;
  }
  view.now = Date.now();
  render(html`<${Page} model=${model} view=${view} actions=${actions} />`, root);
  document.title = title();
}

const same = (one, other) => one.length === other.length && one.every((item, index) => item === other[index]);

function title() {
  if (!view.known) return "ComfyUI queue";
  const [row] = view.lists.running;
  const waiting = view.lists.waiting.length;
  return `${row ? `${row.progress} % · ` : ""}${waiting ? `${waiting} waiting · ` : ""}ComfyUI queue`;
}

// ---- words for ears, a few at a time

let unsaid = [];
let speaking = null;

function announce(text) {
  unsaid.push(text);
  speaking ??= setTimeout(() => {
    announcer.textContent = unsaid.length > 3 ? `${plural(unsaid.length, "change")}, the last: ${unsaid.at(-1)}` : unsaid.join(". ");
    unsaid = [];
    speaking = null;
  }, 1000);
}

function toast(text, kind = "bad") {
  const id = crypto.randomUUID?.() ?? String(Math.random());
  view.toasts = [...view.toasts.slice(-3), { id, text, kind }];
  setTimeout(() => actions.dismiss(id), TOAST_MS);
  changed(false);
}

// ---- the stream

let pending = null; // events that came while the lists were read

const stream = new Stream(
  {
    state(connection) {
      if (!connection.connected && view.connection.connected) announce("Connection lost");
      if (connection.connected && !view.connection.connected && !view.connection.first) announce("Connected again");
      const first = view.connection.first && !connection.connected && !model.loaded && !connection.retryAt;
      view.connection = { ...connection, first };
      changed(false);
    },
    event(event) {
      if (event.type === "subscribed") return void subscribed(event);
      if (event.type === "gap") return void begin();
      if (pending) pending.push(event);
      else hear(event);
    },
    preview(about, blob) {
      model.hearPreview(about, blob);
      changed(false);
    },
  },
  () => (model.loaded ? model.seq : null),
);

const TOLD = {
  "workflow:started": "started",
  "workflow:completed": "completed",
  "workflow:cancelled": "cancelled",
  "workflow:error": "failed",
};
const ELSEWHERE = new Set(["node:executing", "node:progress", "node:executed", "gpu:sample", "queue:status"]);

function hear(event) {
  model.hear(event);
  const row = model.rows.get(event.workflowId);
  if (TOLD[event.type] && row && !event.willRetry) announce(`${nameOf(row)} ${TOLD[event.type]}`);
  if (event.type === "workflow:started") lookAt(event.workflowId);
  if (event.type.startsWith("workflow:") && event.type !== "workflow:progress") reread();
  if (event.type.startsWith("backend:")) readBackends();
  changed(!ELSEWHERE.has(event.type));
}

async function subscribed({ seq, snapshot }) {
  // Numbers that go back: another queue than the one that was shown.
  if (model.seq !== null && seq < model.seq) return begin();
  if (!model.loaded) {
    await load(seq, snapshot);
    return;
  }
  for (const row of model.running()) {
    if (!snapshot.some((one) => one.workflowId === row.workflowId)) model.rows.delete(row.workflowId);
  }
  show(snapshot);
  reread();
  readBackends();
}

// From the beginning, as a new page does.
function begin() {
  model.clear();
  stream.stop();
  stream.start();
}

async function load(seq, snapshot) {
  pending = [];
  const mine = pending;
  model.seq = seq;
  try {
    const read = (status, limit) => api.list({ status, limit });
    const replies = await Promise.all([
      read("queued", QUEUE_ROWS), read("completed", 40), read("failed", 15), read("cancelled", 15), api.backends(), api.status(),
    ]);
    if (mine !== pending) return;
    const [queued, completed, failed, cancelled, { backends }, status] = replies;
    model.takeAll([...cancelled.workflows, ...failed.workflows, ...completed.workflows]);
    model.takeQueue(queued.workflows, queued.nextCursor === null);
    model.backends = backends;
    model.queue = { ...status.comfyui.queue };
    if (!model.gpus.length) model.gpus = status.gpu.gpus;
    view.gpuError = status.gpu.gpus.length ? null : (status.gpu.error ?? null);
    model.loaded = true;
    const held = pending;
    pending = null;
    show(snapshot.filter((row) => !["completed", "failed", "cancelled"].includes(model.rows.get(row.workflowId)?.status)));
    held.forEach(hear);
  } catch (error) {
    if (mine !== pending) return;
    pending = null;
    stream.stop();
    if (!view.known) return;
    view.connection = { connected: false, refused: error.status === 403 ? error : null, retryAt: Date.now() + 5000 };
    if (error.status !== 403) setTimeout(() => view.known && stream.start(), 1000 * (error.retryAfter ?? 5));
  }
  changed();
}

function show(snapshot) {
  for (const row of snapshot) {
    model.take(row);
    lookAt(row.workflowId);
  }
  changed();
}

// The nodes that were done before this page heard of them.
async function lookAt(id) {
  if (!model.nodes.has(id)) model.nodes.set(id, new Map());
  try {
    const row = await api.look(id, "nodes");
    const known = model.rows.get(id);
    if (known?.status !== "running" || row.attempt !== known.attempt) return;
    if (row.nodeTimes) model.takeNodes(row);
    model.rows.set(id, { ...row, ...known, metadata: row.metadata });
    changed();
  } catch (error) {
    if (!(error instanceof api.Refused || error instanceof api.Unreachable)) throw error;
  }
}

// ---- what moves without an event: positions and times

let readAt = 0;
let reading = null;

function reread() {
  if (reading || !model.loaded) return;
  reading = setTimeout(readQueue, Math.max(250, readAt + REREAD_MS - Date.now()));
}

async function readQueue() {
  reading = null;
  readAt = Date.now();
  if (document.hidden) return;
  model.touched.clear();
  try {
    const { workflows, nextCursor } = await api.list({ status: "queued", limit: QUEUE_ROWS });
    model.takeQueue(workflows, nextCursor === null);
    if (model.nameless.size) model.takeNames((await api.list({ limit: 100 })).workflows);
    changed();
  } catch (error) {
    if (error instanceof api.Refused && error.status !== 401) reread();
    else if (!(error instanceof api.Refused || error instanceof api.Unreachable)) throw error;
  }
}

async function readBackends() {
  try {
    model.backends = (await api.backends()).backends;
    changed(false);
  } catch (error) {
    if (!(error instanceof api.Refused || error instanceof api.Unreachable)) throw error;
  }
}

// ---- what the buttons do

// Do it; what goes wrong is told in the service's own words.
async function attempt(what, then) {
  try {
    const reply = await what();
    then?.(reply);
    changed();
    return true;
  } catch (error) {
    if (!(error instanceof api.Refused || error instanceof api.Unreachable)) throw error;
    if (error.status !== 401) toast(error.message);
    return false;
  }
}

const actions = {
  cancel: (row) => attempt(() => api.cancel(row.workflowId), () => toast(`${nameOf(row)} is cancelled.`, "good")),
  retry: (row) => attempt(() => api.retry(row.workflowId), () => toast(`${nameOf(row)} waits again.`, "good")),
  async prioritize(row, select) {
    const done = await attempt(
      () => api.prioritize(row.workflowId, select.value),
      (fresh) => {
        model.take(fresh);
        readQueue();
      },
    );
    if (!done) select.value = row.priority;
  },
  pause: (paused) => attempt(() => api.pause(paused), (queue) => (model.queue = queue)),
  drain: (name, drained) =>
    attempt(() => api.drain(name, drained), (fresh) => (model.backends = model.backends.map((one) => (one.name === name ? fresh : one)))),
  async submit(body) {
    const reply = await api.submit(body);
    if (reply.status === "failed") toast(reply.errors?.[0]?.message ?? "It failed at once.");
    else toast(`${body.metadata.name} is in the queue.`, "good");
  },
  openSubmit(file) {
    view.dialog = { kind: "submit", file, id: Date.now() };
    changed(false);
  },
  details(row) {
    view.dialog = { kind: "details", row };
    changed(false);
  },
  show(url) {
    view.dialog = { kind: "picture", at: url, files: view.dialog?.files ?? filesOf(view.lists.completed) };
    changed(false);
  },
  closeDialog() {
    view.dialog = null;
    changed(false);
  },
  dismiss(id) {
    view.toasts = view.toasts.filter((one) => one.id !== id);
    changed(false);
  },
  toggleTheme() {
    const next = view.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", next);
    document.documentElement.dataset.theme = next;
    view.theme = next;
    changed(false);
  },
  useKey(value) {
    api.key.keep(value);
    enter();
  },
  forgetKey: () => leave(null),
  reconnect: () => stream.now(),
};

function enter() {
  view.known = true;
  view.keyProblem = null;
  view.connection = { connected: false, first: true };
  stream.start();
  changed();
}

function leave(problem) {
  api.key.forget();
  stream.stop();
  model.clear();
  Object.assign(view, { known: false, keyProblem: problem, dialog: null, toasts: [] });
  changed();
}

api.whenUnauthorized(() => leave("The service does not know this key, or it has expired."));

// ---- the world around

function theme() {
  return document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  view.theme = theme();
  changed(false);
});
addEventListener("online", () => stream.now());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  stream.now();
  reread();
});

const carriesFiles = (event) => view.known && [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  if (!view.dragging) changed(false);
  view.dragging = true;
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget) return;
  view.dragging = false;
  changed(false);
});
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  view.dragging = false;
  actions.openSubmit(event.dataTransfer.files[0]);
});

// Clocks that run: how long it takes, when the next attempt to connect is.
setInterval(() => {
  if (view.known && (view.lists.running.length || !view.connection.connected)) changed(false);
}, 1000);

if (view.known) stream.start();
changed();
