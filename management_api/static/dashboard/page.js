// The whole page: what stands where, and the dialogs.

import { Details } from "./details.js";
import { Ended, filesOf, Gallery, Lightbox } from "./ended.js";
import { Backends, Gpus } from "./house.js";
import { Icon } from "./icons.js";
import { Queue } from "./queue.js";
import { Running } from "./running.js";
import { Submit } from "./submit.js";
import { Component, html } from "./ui.js";

export function Page({ model, view, actions }) {
  if (!view.known) return html`<${KeyForm} problem=${view.keyProblem} onKey=${actions.useKey} />`;
  const rows = view.lists;
  return html`
    <${Header} view=${view} queue=${model.queue} running=${rows.running.length} waiting=${rows.waiting.length} actions=${actions} />
    <${Banner} connection=${view.connection} onNow=${actions.reconnect} />
    <main class="grid" aria-busy=${!model.loaded}>
      <div class="column">
        <${Running} rows=${rows.running} nodes=${model.nodes} previews=${model.previews} now=${view.now} backends=${model.backends}
          actions=${actions} paused=${model.queue.paused} waiting=${rows.waiting.length} />
        <${Queue} rows=${rows.waiting} queue=${model.queue} pools=${model.backends.length} actions=${actions} />
        <${Gpus} gpus=${model.gpus} history=${model.history} version=${model.version} theme=${view.theme} error=${view.gpuError} />
      </div>
      <div class="column">
        <${Gallery} rows=${rows.completed} actions=${actions} />
        <${Ended} rows=${rows.ended} actions=${actions} />
        <${Backends} backends=${model.backends} running=${rows.running} rows=${rows.running} actions=${actions} />
      </div>
    </main>
    <ul class="toasts" role="status" aria-live="polite">${view.toasts.map((toast) => html`<li key=${toast.id} class=${`toast ${toast.kind}`}>
      <span>${toast.text}</span>
      <button class="quiet square" type="button" aria-label="Dismiss" onClick=${() => actions.dismiss(toast.id)}><${Icon} name="close" /></button>
    </li>`)}</ul>
    ${view.dragging && html`<div class="drop" aria-hidden="true"><p>Drop the workflow or the picture</p></div>`}
    ${view.dialog?.kind === "submit" && html`<${Submit} key=${view.dialog.id} file=${view.dialog.file} pools=${model.backends.map((one) => one.name)} onSubmit=${actions.submit} onClose=${actions.closeDialog} />`}
    ${view.dialog?.kind === "details" && html`<${Details} key=${view.dialog.row.workflowId} row=${view.dialog.row} actions=${actions} onClose=${actions.closeDialog} />`}
    ${view.dialog?.kind === "picture" && html`<${Lightbox} files=${view.dialog.files} at=${view.dialog.at} onShow=${actions.show} onClose=${actions.closeDialog} />`}
  `;
}

export const lists = (model) => {
  const ended = model.ended();
  return { running: model.running(), waiting: model.waiting(), ended, completed: ended.filter((row) => row.status === "completed") };
};

export { filesOf };

function Header({ view, queue, running, waiting, actions }) {
  const dark = view.theme === "dark";
  return html`<header class="top">
    <h1><img src="/dashboard/icon.svg" alt="" width="24" height="24" />ComfyUI queue</h1>
    <p class=${`live ${view.connection.connected ? "on" : "off"}`}><span class="dot"></span>${view.connection.connected ? "live" : "not connected"}</p>
    <p class="facts"><span><strong>${running}</strong> running</span><span><strong>${Math.max(queue.length, waiting)}</strong> waiting</span>${queue.paused && html`<span class="tag warn">paused</span>`}</p>
    <nav class="tools" aria-label="Tools">
      <button class="primary" type="button" onClick=${() => actions.openSubmit(null)}><${Icon} name="plus" /><span>Submit</span></button>
      <button class="quiet square" type="button" aria-label=${dark ? "Use light colours" : "Use dark colours"} onClick=${actions.toggleTheme}><${Icon} name=${dark ? "sun" : "moon"} /></button>
      <button class="quiet" type="button" aria-label="Forget key" title="Forget the key" onClick=${actions.forgetKey}><${Icon} name="leave" /><span class="wide-only">Forget key</span></button>
    </nav>
  </header>`;
}

function Banner({ connection, onNow }) {
  if (connection.connected || connection.first) return null;
  const seconds = connection.retryAt ? Math.max(0, Math.ceil((connection.retryAt - Date.now()) / 1000)) : null;
  return html`<div class="banner" role="status">
    <span>${connection.refused ? connection.refused.message : `Connection lost. What you see is how it was.`}</span>
    <span aria-hidden="true">${seconds ? `Trying again in ${seconds} s` : connection.refused ? "" : "Trying …"}</span>
    ${!connection.refused && html`<button class="quiet" type="button" onClick=${onNow}>Try now</button>`}
  </div>`;
}

class KeyForm extends Component {
  submit = (event) => {
    event.preventDefault();
    const value = new FormData(event.target).get("key").trim();
    if (value) this.props.onKey(value);
  };

  render({ problem }) {
    return html`<main class="welcome">
      <form class="card" onSubmit=${this.submit}>
        <h1><img src="/dashboard/icon.svg" alt="" width="28" height="28" />ComfyUI queue</h1>
        <p>This page needs a key of the service: <code>MANAGEMENT_API_KEY</code>, or a named one with the scope <code>read</code>.</p>
        ${problem && html`<p class="problem" role="alert" id="key-problem">${problem}</p>`}
        <label>Key <input name="key" type="password" autocomplete="off" spellcheck="false" required autofocus aria-describedby=${problem ? "key-problem" : null} /></label>
        <button class="primary" type="submit">Open</button>
        <p class="note">The key stays in this tab, until you close it or press “Forget key”.</p>
      </form>
    </main>`;
  }
}
