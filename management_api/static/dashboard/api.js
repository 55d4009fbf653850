// The service by HTTP. The key lives in sessionStorage and travels in a header: never in a URL, never on disk.

const STORED = "management-api-key";

export class Refused extends Error {
  constructor(status, problem, retryAfter) {
    super(problem.detail || problem.title || `The service answered ${status}`);
    this.status = status;
    this.problem = problem;
    this.retryAfter = retryAfter;
  }
}

export class Unreachable extends Error {}

export const key = {
  get: () => sessionStorage.getItem(STORED),
  keep: (value) => sessionStorage.setItem(STORED, value),
  forget: () => sessionStorage.removeItem(STORED),
};

let onUnauthorized = () => {};

// Called when the service does not know the key.
export function whenUnauthorized(then) {
  onUnauthorized = then;
}

async function ask(method, path, { body, headers, seconds = 30, signal } = {}) {
  const shown = key.get();
  const signals = [AbortSignal.timeout(seconds * 1000)];
  if (signal) signals.push(signal);
  let reply;
  try {
    reply = await fetch(path, {
      method,
      body: body === undefined ? undefined : JSON.stringify(body),
      headers: {
        "X-API-Key": shown ?? "",
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        ...headers,
      },
      signal: AbortSignal.any(signals),
      credentials: "omit",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Unreachable("The service does not answer");
  }
  if (reply.ok) return reply;
  const problem = await reply.json().catch(() => ({}));
  if (reply.status === 401 && shown === key.get()) onUnauthorized();
  throw new Refused(reply.status, problem, Number(reply.headers.get("retry-after")) || null);
}

const json = async (...args) => (await ask(...args)).json();
const WORKFLOWS = "/v1/comfyui/workflow";
const BACKENDS = "/v1/comfyui/backends";

export const ticket = () => json("POST", "/v1/comfyui/stream/ticket", { seconds: 15 });
export const list = (query) => json("GET", `${WORKFLOWS}?${new URLSearchParams(query)}`);
export const look = (id, include) => json("GET", `${WORKFLOWS}/${id}?include=${include}`);
export const submit = (body) => json("POST", WORKFLOWS, { body });
export const cancel = (id) => json("DELETE", `${WORKFLOWS}/${id}`);
export const retry = (id) => json("POST", `${WORKFLOWS}/${id}/retry`);
export const prioritize = (id, priority) => json("PATCH", `${WORKFLOWS}/${id}`, { body: { priority } });
export const pause = (paused) => json("POST", `/v1/comfyui/queue/${paused ? "pause" : "resume"}`);
export const backends = () => json("GET", BACKENDS);
export const drain = (name, drained) =>
  json("POST", `${BACKENDS}/${encodeURIComponent(name)}/${drained ? "drain" : "resume"}`);
export const status = () => json("GET", "/v1/status");
// An <img> can show no key, so the page fetches what it shows.
export async function file(path, signal) {
  if (!/^\/[^/\\]/.test(path)) throw new Error("This file is not at the service"); // nobody else gets the key
  return (await ask("GET", path, { seconds: 300, signal })).blob();
}
