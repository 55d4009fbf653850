// What runs now: the node it is at, its steps, its picture, and what is done.

import { Icon, NodeIcon } from "./icons.js";
import { html, LivePicture, memo, Progress } from "./ui.js";
import { about, duration, nameOf } from "./words.js";

export function Running({ rows, nodes, previews, now, backends, actions, paused, waiting }) {
  return html`<section class="card running" aria-labelledby="running-title">
    <h2 id="running-title">Running</h2>
    ${rows.length === 0 && html`<p class="empty">${idle(backends, paused, waiting)}</p>`}
    ${rows.map((row) => {
      const id = row.workflowId;
      return html`<${Run} key=${id} row=${row} nodes=${nodes.get(id)} preview=${previews.get(id)} now=${now} actions=${actions} />`;
    })}
  </section>`;
}

function idle(backends, paused, waiting) {
  if (paused) return "Nothing runs: the queue is paused.";
  if (backends.length && backends.every((one) => one.state !== "connected")) return "Nothing runs: no ComfyUI is connected.";
  if (waiting) return "Nothing runs yet.";
  return "Nothing runs. Drop a workflow file or a ComfyUI picture anywhere on this page.";
}

// Whole ones: this one counts.
const seconds = (elapsed) => (elapsed < 10 ? `${Math.max(0, Math.floor(elapsed))} s` : duration(Math.floor(elapsed)));

const Run = memo(({ row, nodes, preview, now, actions }) => {
  const all = [...(nodes?.values() ?? [])];
  // One that has become others is shown as these.
  const expanded = new Set(all.filter((node) => node.state === "running" && node.display !== node.id).map((node) => node.display));
  const current = all.filter((node) => node.state === "running" && !expanded.has(node.id));
  const others = all.filter((node) => node.state !== "running");
  const { total = 0, done: count = 0 } = row.nodes ?? {};
  const elapsed = row.startTime ? (now - row.startTime) / 1000 : 0;
  return html`<article class="run" aria-label=${`Workflow ${nameOf(row)}`}>
    <header class="run-head">
      <h3 title=${row.workflowId}>${nameOf(row)}</h3>
      <span class="facts">
        <span>on ${row.backend ?? "…"}</span>
        <span>${seconds(elapsed)}</span>
        ${row.etaSeconds != null && html`<span title=${row.etaP90Seconds != null ? `Nine of ten such end within ${about(row.etaP90Seconds)}` : ""}>ready in ${about(row.etaSeconds)}</span>`}
        ${row.attempt > 1 && html`<span>attempt ${row.attempt}</span>`}
      </span>
      <button class="quiet" type="button" aria-label=${`Details of ${nameOf(row)}`} onClick=${() => actions.details(row)}>Details</button>
      <button class="quiet danger" type="button" aria-label=${`Cancel ${nameOf(row)}`} onClick=${() => actions.cancel(row)}>Cancel</button>
    </header>
    <div class="whole">
      <${Progress} value=${(row.progress ?? 0) / 100} label=${`Progress of ${nameOf(row)}`} />
      <span class="percent">${row.progress ?? 0} %</span>
    </div>
    <div class="stage">
      <div class="current">
        ${current.map((node) => html`<${CurrentNode} key=${node.id} node=${node} main=${current.length === 1 || node.id === row.currentNodeId} />`)}
        ${current.length === 0 && html`<p class="empty">${row.currentNode ?? "It begins …"}</p>`}
        ${(others.length > 0 || total > 0) && html`<details class="done" open>
          <summary>${count} of ${total || all.length} nodes done</summary>
          <ul class="done-list" aria-label="Nodes done">${others.filter(isDone).map(line)}</ul>
          ${others.some((node) => !isDone(node)) && html`<ul class="done-list" aria-label="Nodes to come">${others.filter((node) => !isDone(node)).map(line)}</ul>`}
        </details>`}
      </div>
      ${preview && html`<figure class="live">
        <${LivePicture} blob=${preview.blob} alt=${`Preview of ${nameOf(row)}`} />
      </figure>`}
    </div>
  </article>`;
});

const CurrentNode = memo(({ node, main }) => {
  const steps = node.max > 1;
  const value = node.max ? Math.min(1, (node.value ?? 0) / node.max) : 0;
  const text = steps ? `${Math.round(node.value ?? 0)}/${Math.round(node.max)} steps` : "running";
  return html`<div class=${main ? "node main" : "node"} data-node=${node.id}>
    <span class="badge pulse"><${NodeIcon} type=${node.type} /></span>
    <div class="node-words">
      <strong>${node.name}</strong>
      <span class="kind">${node.type && node.type !== node.name ? `${node.type} · ` : ""}<span class="steps">${text}</span></span>
      ${steps && html`<${Progress} value=${value} label=${`Steps of ${node.name}`} text=${text} slim />`}
    </div>
  </div>`;
});

const isDone = (node) => node.state !== "pending";
const line = (node) => html`<${Line} key=${node.id} node=${node} />`;
const SIGNS = { cached: "cached", pending: "wait" };
const WORDS = { cached: "cached", pending: "to come" };

const Line = memo(({ node }) => html`<li class=${node.state}>
  <${Icon} name=${SIGNS[node.state] ?? "done"} />
  <span class="done-name">${node.name}</span>
  <span class="time">${WORDS[node.state] ?? duration(node.seconds)}</span>
</li>`);

export function NodeTimes({ times }) {
  return html`<table class="plain">
    <caption>Nodes and their times</caption>
    <thead><tr><th scope="col">Node</th><th scope="col">Class</th><th scope="col">State</th><th scope="col" class="number">Time</th></tr></thead>
    <tbody>${times.map((node) => html`<tr key=${node.nodeId}>
      <td>${node.nodeName ?? node.nodeId}</td><td>${node.nodeType}</td><td>${node.state}</td>
      <td class="number">${node.state === "cached" ? "–" : duration(node.seconds)}</td>
    </tr>`)}</tbody>
  </table>`;
}
