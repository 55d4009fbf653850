// What the page knows. Events and replies go in; rows are replaced, never changed, so that whoever shows one can tell
// by identity whether it has to be drawn again. Touches neither the network nor the document.

const FINAL = new Set(["completed", "failed", "cancelled"]);
const MOST_ENDED = 200;
export const CHART_SECONDS = 900;

export class Model {
  constructor() {
    this.clear();
    this.gpus = [];
    this.history = new Map(); // gpuId -> [{t, utilization, memory, power}], a point a second
  }

  // All but the charts.
  clear() {
    this.rows = new Map();
    this.place = new Map(); // id -> where it stands in the queue; may lie between two others
    this.nodes = new Map(); // id -> Map(nodeId -> node)
    this.previews = new Map(); // id -> {blob, nodeId}
    this.queue = { length: 0, running: 0, paused: false };
    this.backends = [];
    this.seq = null;
    this.loaded = false;
    this.version = 0;
    this.nameless = new Set(); // known by events alone, which tell no names
    this.touched = new Set(); // what events told of since the queue was asked for
  }

  // ---- replies

  takeAll(rows) {
    for (const row of rows) this.take(row);
  }

  take(row) {
    this.rows.set(row.workflowId, row);
    if (row.status === "queued") this.place.set(row.workflowId, row.queuePosition ?? 0);
    else this.place.delete(row.workflowId);
    if (row.nodeTimes) this.takeNodes(row);
    if (FINAL.has(row.status)) this.letGo(row.workflowId);
  }

  // The whole queue as it was when it was asked for (`touched` was emptied then): who is not in it waits no more. What
  // events have told since is newer, but knows no names.
  takeQueue(rows, whole) {
    const there = new Set(rows.map((row) => row.workflowId));
    for (const id of [...this.place.keys()]) {
      if (!whole || there.has(id) || this.touched.has(id)) continue;
      this.place.delete(id);
      if (this.rows.get(id)?.status === "queued") this.rows.delete(id);
    }
    for (const row of rows) {
      const id = row.workflowId;
      const known = this.rows.get(id);
      if (this.touched.has(id)) {
        if (known) this.rows.set(id, { ...row, ...known, metadata: row.metadata, submittedBy: row.submittedBy });
        continue;
      }
      this.place.set(id, row.queuePosition ?? 0);
      if (!known || !alike(known, row)) this.rows.set(id, row);
    }
  }

  // What events do not tell.
  takeNames(rows) {
    for (const { workflowId, metadata, submittedBy, createdAt, retryOf } of rows) {
      const known = this.rows.get(workflowId);
      if (known && this.nameless.has(workflowId)) this.rows.set(workflowId, { ...known, metadata, submittedBy, createdAt, retryOf });
    }
    this.nameless.clear();
  }

  takeNodes(row) {
    const nodes = new Map();
    for (const one of row.nodeTimes) {
      nodes.set(one.nodeId, {
        id: one.nodeId,
        name: one.nodeName || one.nodeType || one.nodeId,
        type: one.nodeType,
        state: one.state,
        startedAt: one.startTime,
        seconds: one.seconds,
      });
    }
    // What was heard meanwhile is newer, but may not know when it began.
    for (const [id, node] of this.nodes.get(row.workflowId) ?? []) {
      const told = nodes.get(id);
      if (!told || stage(node) >= stage(told)) {
        nodes.set(id, { ...told, ...node, startedAt: told?.startedAt ?? node.startedAt, seconds: told?.seconds ?? node.seconds });
      }
    }
    this.nodes.set(row.workflowId, nodes);
  }

  // ---- events

  hear(event) {
    if (typeof event.seq === "number" && event.type !== "subscribed" && event.type !== "heartbeat") {
      if (this.seq !== null && event.seq <= this.seq) return;
      this.seq = event.seq;
    }
    const [kind] = event.type.split(":");
    if (kind === "workflow") this.hearWorkflow(event);
    else if (kind === "node") this.hearNode(event);
    else if (event.type === "queue:status") this.queue = event;
    else if (event.type === "gpu:sample") this.hearGpus(event);
    else if (kind === "backend") this.hearBackend(event);
  }

  hearWorkflow(event) {
    const id = event.workflowId;
    if (event.type !== "workflow:progress") this.touched.add(id);
    if (!this.rows.has(id)) this.nameless.add(id);
    const row = this.rows.get(id) ?? fresh(id, event);
    if (FINAL.has(row.status)) return;
    const change = (more) => this.rows.set(id, { ...row, ...more });
    switch (event.type) {
      case "workflow:queued":
        if (event.attempt < row.attempt) return;
        this.stand(id, event);
        this.letGo(id);
        change({ status: "queued", attempt: event.attempt, priority: event.priority, gpu: event.gpu, progress: 0 });
        break;
      case "workflow:started":
        this.place.delete(id);
        this.nodes.set(id, new Map());
        change({
          status: "running",
          backend: event.backend,
          attempt: event.attempt,
          startTime: event.startTime,
          progress: 0,
          queuePosition: null,
          etaSeconds: null,
          step: null,
          steps: null,
        });
        break;
      case "workflow:progress": {
        if (row.status !== "running") return;
        const { type, timestamp, workflowId, ...told } = event;
        change(told);
        break;
      }
      case "workflow:completed":
        this.finish(id, {
          ...row,
          status: "completed",
          progress: 100,
          outputs: event.outputs,
          outputsReused: event.outputsReused,
          errors: event.errors,
          completionTime: event.timestamp,
          startTime: row.startTime ?? event.timestamp - event.duration * 1000,
        });
        break;
      case "workflow:cancelled":
        this.finish(id, { ...row, status: "cancelled", completionTime: event.timestamp });
        break;
      case "workflow:error":
        if (event.willRetry) return;
        this.finish(id, {
          ...row,
          status: "failed",
          error: event.error,
          errorType: event.errorType,
          errors: event.errors,
          completionTime: event.timestamp,
        });
    }
  }

  finish(id, row) {
    this.place.delete(id);
    this.rows.delete(id); // so that the latest are the last
    this.rows.set(id, row);
    this.letGo(id);
    const ended = [...this.rows.values()].filter((one) => FINAL.has(one.status));
    for (const old of ended.slice(0, Math.max(0, ended.length - MOST_ENDED))) this.rows.delete(old.workflowId);
  }

  letGo(id) {
    this.nodes.delete(id);
    this.previews.delete(id);
  }

  // Where it says, among those that wait for the same.
  stand(id, { queuePosition, gpu }) {
    const others = this.waiting().filter((row) => row.gpu === gpu && row.workflowId !== id);
    const before = others[queuePosition - 1];
    const behind = others[queuePosition];
    const from = before ? this.place.get(before.workflowId) : (behind ? this.place.get(behind.workflowId) : 1) - 1;
    const to = behind ? this.place.get(behind.workflowId) : from + 1;
    this.place.set(id, before && !behind ? from + 1 : (from + to) / 2);
  }

  hearNode(event) {
    const nodes = this.nodes.get(event.workflowId);
    if (!nodes) return;
    const known = nodes.get(event.nodeId);
    const node = {
      ...known,
      id: event.nodeId,
      name: event.nodeName || known?.name || event.nodeType || event.nodeId,
      type: event.nodeType || known?.type,
      state: event.nodeState,
      display: event.displayNodeId,
    };
    if (event.nodeState === "running") {
      node.startedAt = known?.startedAt ?? (event.type === "node:executing" ? event.timestamp : null);
      node.value = event.nodeProgress;
      node.max = event.nodeMaxProgress;
    } else {
      node.max = null;
      node.seconds = event.nodeState === "cached" || !node.startedAt ? known?.seconds : (event.timestamp - node.startedAt) / 1000;
    }
    nodes.set(node.id, node);
    this.nodes.set(event.workflowId, new Map(nodes));
  }

  hearPreview(about, blob) {
    if (this.rows.get(about.workflow_id)?.status !== "running") return;
    this.previews.set(about.workflow_id, { blob, nodeId: about.display_node_id ?? about.node_id });
  }

  hearBackend(event) {
    const state = event.type.slice("backend:".length);
    if (state === "stalled" && !event.proven) return;
    this.backends = this.backends.map((one) => (one.name === event.backend ? { ...one, state } : one));
  }

  hearGpus({ timestamp, gpus }) {
    this.gpus = gpus;
    const t = Math.floor(timestamp / 1000);
    for (const gpu of gpus) {
      const points = this.history.get(gpu.gpuId) ?? [];
      const point = { t, utilization: gpu.utilization, memory: gpu.memory ? gpu.memory.used / 1024 : null, power: gpu.powerWatts ?? null };
      if (points.at(-1)?.t === t) points[points.length - 1] = point;
      else points.push(point);
      while (points.length && points[0].t < t - CHART_SECONDS) points.shift();
      this.history.set(gpu.gpuId, points);
    }
    this.version += 1;
  }

  // ---- what is asked of it

  // The queue in order.
  waiting() {
    const rows = [];
    for (const [id, place] of this.place) {
      const row = this.rows.get(id);
      if (row) rows.push({ row, place });
    }
    rows.sort((a, b) => a.place - b.place || a.row.createdAt - b.row.createdAt || (a.row.workflowId < b.row.workflowId ? -1 : 1));
    return rows.map(({ row }) => row);
  }

  running() {
    const rows = [...this.rows.values()].filter((row) => row.status === "running");
    return rows.sort((a, b) => (a.backend ?? "").localeCompare(b.backend ?? "") || a.startTime - b.startTime);
  }

  // The latest first.
  ended() {
    const rows = [...this.rows.values()].filter((row) => FINAL.has(row.status));
    return rows.sort((a, b) => (b.completionTime ?? b.createdAt) - (a.completionTime ?? a.createdAt));
  }
}

function fresh(id, event) {
  return {
    workflowId: id,
    status: "queued",
    priority: event.priority ?? "normal",
    gpu: event.gpu ?? "local",
    createdAt: event.createdAt ?? event.timestamp,
    attempt: 0,
    progress: 0,
    outputs: [],
    errors: [],
    metadata: null,
    nodes: { total: 0, done: 0, cached: 0 },
  };
}

const STAGES = { pending: 0, running: 1 };
const stage = (node) => STAGES[node.state] ?? 2;
const SHOWN = ["status", "attempt", "priority", "gpu", "etaSeconds", "etaP90Seconds", "submittedBy", "retryOf"];

function alike(one, other) {
  return SHOWN.every((name) => one[name] === other[name]) && one.metadata?.name === other.metadata?.name;
}
