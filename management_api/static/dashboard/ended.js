// What has ended: a list with what became of each, and the pictures.

import { Icon } from "./icons.js";
import { Component, Dialog, html, memo, Picture } from "./ui.js";
import { bytes, clock, duration, nameOf, STATUS } from "./words.js";

export const PICTURES = 24;
const SHOWN = 30;

export const Ended = memo(({ rows, actions }) => html`<section class="card ended" aria-labelledby="ended-title">
  <h2 id="ended-title">Ended</h2>
  ${rows.length === 0
    ? html`<p class="empty">Nothing has ended yet.</p>`
    : html`<ul class="rows short" aria-label="Ended workflows, the latest first" tabindex="0">
        ${rows.slice(0, SHOWN).map((row) => html`<${Row} key=${row.workflowId} row=${row} actions=${actions} />`)}
      </ul>`}
</section>`);

const Row = memo(({ row, actions }) => {
  const name = nameOf(row);
  const took = row.startTime && row.completionTime ? (row.completionTime - row.startTime) / 1000 : null;
  return html`<li class="row past" data-id=${row.workflowId}>
    <span class=${`tag ${row.status}`}>${STATUS[row.status]}</span>
    <button class="name" type="button" title=${row.workflowId} onClick=${() => actions.details(row)}>${name}</button>
    <span class="eta" title=${row.error ?? ""}>${row.status === "failed" ? row.error : duration(took)}</span>
    <time class="when">${clock(row.completionTime ?? row.createdAt)}</time>
    ${row.status === "completed"
      ? html`<span class="square"></span>`
      : html`<button class="quiet square" type="button" aria-label=${`Retry ${name}`} onClick=${() => actions.retry(row)}><${Icon} name="again" /></button>`}
  </li>`;
});

// At the service itself: `url` may lead to a bucket.
const pathOf = (output) => output.localUrl ?? output.url;

// The newest files of these rows.
export function filesOf(rows) {
  const files = [];
  for (const row of rows) {
    for (const output of row.outputs ?? []) {
      const path = pathOf(output);
      if (!path || output.kind === "text") continue;
      files.push({ key: path, row, output });
      if (files.length === PICTURES) return files;
    }
  }
  return files;
}

export const Gallery = memo(({ rows, actions }) => {
  const files = filesOf(rows);
  return html`<section class="card gallery" aria-labelledby="gallery-title">
    <h2 id="gallery-title">Outputs</h2>
    ${files.length === 0
      ? html`<p class="empty">No outputs yet.</p>`
      : html`<ul class="pictures">${files.map(({ key, row, output }) => html`<${Thumbnail} key=${key} row=${row} output=${output} actions=${actions} />`)}</ul>`}
  </section>`;
});

const Thumbnail = memo(({ row, output, actions }) => html`<li>
  <button class="thumbnail" type="button" aria-label=${`Show ${output.filename} of ${nameOf(row)}`} onClick=${() => actions.show(pathOf(output))}>
    ${output.kind === "image"
      ? html`<${Picture} src=${pathOf(output)} alt="" />`
      : html`<span class="picture other"><${Icon} name=${output.kind === "video" || output.kind === "audio" ? output.kind : "file"} />${output.filename}</span>`}
  </button>
</li>`);

const PLAYABLE = new Set(["image", "video", "audio"]);

// One file in full, and the way to its neighbours.
export class Lightbox extends Component {
  state = { url: null };

  step(by) {
    const { files, at, onShow } = this.props;
    const next = files[files.findIndex((file) => file.key === at) + by];
    if (next) {
      this.setState({ url: null });
      onShow(next.key);
    }
  }

  render({ files, at, onClose }, { url }) {
    const place = files.findIndex((file) => file.key === at);
    const found = files[place];
    if (!found) return null;
    const { row, output } = found;
    const animated = output.kind === "video" && output.contentType?.startsWith("image/");
    return html`<${Dialog} title=${output.filename} onClose=${onClose} wide>
      <div class="full" onKeyDown=${(event) => event.key === "ArrowLeft" ? this.step(-1) : event.key === "ArrowRight" && this.step(1)}>
        ${PLAYABLE.has(output.kind)
          ? html`<${Picture} key=${at} eager src=${at} kind=${animated ? "image" : output.kind} alt=${`${output.filename}, made by ${nameOf(row)}`} onUrl=${(got) => this.setState({ url: got })} />`
          : html`<p class="empty">This kind of file is not shown here.</p>`}
        <div class="full-foot">
          <button class="quiet square" type="button" aria-label="The newer one" disabled=${place === 0} onClick=${() => this.step(-1)}><${Icon} name="left" /></button>
          <span class="facts"><span>${nameOf(row)}</span><span>${clock(row.completionTime)}</span><span>${bytes(output.size)}</span></span>
          ${url && html`<a class="button quiet" href=${url} download=${output.filename}>Save</a>`}
          <button class="quiet square" type="button" aria-label="The older one" disabled=${place === files.length - 1} onClick=${() => this.step(1)}><${Icon} name="right" /></button>
        </div>
      </div>
    <//>`;
  }
}
