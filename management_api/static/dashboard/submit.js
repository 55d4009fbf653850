// Handing in: a file that was dropped or chosen, how urgent, and where.

import { read } from "./files.js";
import { Component, createRef, Dialog, html } from "./ui.js";
import { plural } from "./words.js";

export class Submit extends Component {
  chooser = createRef();

  constructor(props) {
    super(props);
    this.state = { given: null, problem: null, sending: false, findings: [] };
    if (props.file) this.take(props.file);
  }

  async take(file) {
    if (!file) return;
    this.setState({ problem: null, given: null, findings: [] });
    try {
      this.setState({ given: { ...(await read(file)), name: file.name } });
    } catch (error) {
      this.setState({ problem: error.message });
    }
  }

  send = async (event, close) => {
    event.preventDefault();
    const { given } = this.state;
    const form = new FormData(event.target);
    this.setState({ sending: true, problem: null, findings: [] });
    try {
      await this.props.onSubmit({
        workflow: given.workflow,
        priority: form.get("priority"),
        gpu: form.get("gpu"),
        metadata: { name: form.get("name") || given.name, ...(given.metadata ?? {}) },
      });
      close();
    } catch (error) {
      this.setState({ problem: error.message, findings: error.problem?.errors ?? [], sending: false });
    }
  };

  render({ onClose, pools }, { given, problem, sending, findings }) {
    return html`<${Dialog} title="Submit a workflow" onClose=${onClose}>${(close) => html`
      <form class="submit" onSubmit=${(event) => this.send(event, close)}>
        <p class="file-line">
          <input ref=${this.chooser} type="file" id="file" class="unseen" accept=".json,.png,application/json,image/png" tabindex="-1" aria-hidden="true"
            onChange=${(event) => this.take(event.target.files[0])} />
          <button type="button" class=${given ? "quiet" : "primary"} onClick=${() => this.chooser.current.click()}>Choose a file</button>
          <span class="note">A workflow in API format (JSON), or a PNG that ComfyUI saved. It may also be dropped anywhere on the page.</span>
        </p>
        ${problem && html`<p class="problem" role="alert">${problem}</p>`}
        ${findings.length > 0 && html`<ul class="findings">${findings.slice(0, 10).map((one) => html`<li>${one.message}</li>`)}</ul>`}
        ${given && html`
          <p class="given"><strong>${given.name}</strong> <span class="note">${plural(given.nodes, "node")}</span></p>
          <div class="fields">
            <label>Name <input name="name" value=${given.metadata?.name ?? given.name} maxlength="200" /></label>
            <label>Priority <select name="priority" value=${given.priority ?? "normal"}>
              <option value="high">high</option><option value="normal">normal</option><option value="low">low</option>
            </select></label>
            <label>Runs on <select name="gpu" value=${given.gpu ?? "local"}>
              ${[...new Set(["local", ...pools])].map((name) => html`<option value=${name}>${name === "local" ? "any backend" : name}</option>`)}
            </select></label>
          </div>
          <footer class="dialog-foot">
            <button type="button" class="quiet" onClick=${close}>Not now</button>
            <button type="submit" class="primary" disabled=${sending}>${sending ? "Submitting …" : "Submit"}</button>
          </footer>`}
      </form>`}<//>`;
  }
}
