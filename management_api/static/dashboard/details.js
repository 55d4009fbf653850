// One workflow, whole: what became of it, how long its nodes took, what it cost.

import { look } from "./api.js";
import { NodeTimes } from "./running.js";
import { Component, Dialog, html } from "./ui.js";
import { about, bytes, clock, duration, nameOf, STATUS } from "./words.js";

export class Details extends Component {
  state = { row: null, problem: null };

  async componentDidMount() {
    try {
      this.setState({ row: await look(this.props.row.workflowId, "attempts,nodes") });
    } catch (error) {
      this.setState({ problem: error.message });
    }
  }

  render({ row: known, onClose, actions }, { row: asked, problem }) {
    const row = asked ?? known;
    const final = row.status === "failed" || row.status === "cancelled";
    return html`<${Dialog} title=${nameOf(row)} onClose=${onClose}>${(close) => html`
      ${problem && html`<p class="problem" role="alert">${problem}</p>`}
      ${row.error && html`<p class="problem">${row.error}</p>`}
      <dl class="facts-list">${facts(row).filter(([, value]) => value).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
      ${row.errors?.length > 0 && html`<h3>Findings</h3><ul class="findings">${row.errors.map((one) => html`<li>${one.message}</li>`)}</ul>`}
      ${row.nodeTimes?.length > 0 && html`<${NodeTimes} times=${row.nodeTimes} />`}
      <footer class="dialog-foot">
        <button type="button" class="quiet" onClick=${close}>Close</button>
        ${final && html`<button type="button" class="primary" onClick=${() => { close(); actions.retry(row); }}>Retry</button>`}
        ${(row.status === "queued" || row.status === "running") && html`<button type="button" class="danger" onClick=${() => { close(); actions.cancel(row); }}>Cancel it</button>`}
      </footer>`}<//>`;
  }
}

function facts(row) {
  const { gpuSeconds, vramPeakBytes, energyJoules } = row.cost ?? {};
  const took = row.startTime && row.completionTime ? (row.completionTime - row.startTime) / 1000 : null;
  return [
    ["State", STATUS[row.status] + (row.errorType ? ` (${row.errorType})` : "")],
    ["Id", row.workflowId],
    ["Submitted", `${clock(row.createdAt)}${row.submittedBy ? ` by ${row.submittedBy}` : ""}`],
    ["Priority", row.priority],
    ["Ready in", row.etaSeconds != null ? about(row.etaSeconds) : null],
    ["Backend", row.backend ?? (row.gpu === "local" ? "any" : row.gpu)],
    ["Waited", row.startTime ? duration((row.startTime - row.createdAt) / 1000) : null],
    ["Took", duration(took)],
    ["Attempts", row.attempt > 1 ? String(row.attempt) : null],
    ["GPU time", gpuSeconds != null ? duration(gpuSeconds) : null],
    ["VRAM peak", vramPeakBytes != null ? bytes(vramPeakBytes) : null],
    ["Energy", energyJoules != null ? `${(energyJoules / 3600).toFixed(2)} Wh` : null],
    ["Retry of", row.retryOf],
  ];
}
