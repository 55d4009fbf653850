// What waits, in order. Of a long queue only the rows near the eye are drawn: 500 that move at once are ordinary.

import { Icon } from "./icons.js";
import { Component, createRef, html, memo } from "./ui.js";
import { about, clock, nameOf, plural } from "./words.js";

const ALL = 60; // so many are drawn without more ado
const AROUND = 10;

export const Queue = memo(({ rows, queue, pools, actions }) => html`<section class="card queue" aria-labelledby="queue-title">
  <header class="card-head">
    <h2 id="queue-title">Queue</h2>
    <span class="facts">${rows.length ? plural(Math.max(queue.length, rows.length), "workflow") : "empty"}</span>
    ${queue.paused && html`<span class="tag warn">paused</span>`}
    <button class="quiet" type="button" onClick=${() => actions.pause(!queue.paused)}>
      <${Icon} name=${queue.paused ? "play" : "pause"} />${queue.paused ? "Resume queue" : "Pause queue"}
    </button>
  </header>
  ${rows.length === 0 ? html`<p class="empty">Nothing waits.</p>` : html`<${Rows} rows=${rows} pools=${pools} actions=${actions} />`}
  ${queue.length > rows.length && rows.length > 0 && html`<p class="note">The first ${rows.length} are shown.</p>`}
</section>`);

class Rows extends Component {
  element = createRef();
  state = { first: 0, shown: 30, height: 40 };

  componentDidMount() {
    this.observer = new ResizeObserver(this.measure);
    this.observer.observe(this.element.current);
  }

  componentDidUpdate() {
    this.measure();
  }

  componentWillUnmount() {
    this.observer.disconnect();
  }

  // Which rows are near the eye; all rows are of one height.
  measure = () => {
    const list = this.element.current;
    const height = list?.querySelector("li")?.offsetHeight;
    if (!height) return;
    const first = Math.max(0, Math.floor(list.scrollTop / height) - AROUND);
    const shown = Math.ceil(list.clientHeight / height) + 2 * AROUND;
    const { state } = this;
    const far = Math.abs(first - state.first) >= AROUND / 2 || (first === 0 && state.first !== 0);
    if (height !== state.height || shown !== state.shown || far) this.setState({ first, shown, height });
  };

  render({ rows, pools, actions }, { first, shown, height }) {
    const all = rows.length <= ALL;
    const from = all ? 0 : Math.min(first, Math.max(0, rows.length - shown));
    const to = all ? rows.length : Math.min(rows.length, from + shown);
    const positions = new Map();
    const drawn = [];
    for (let index = 0; index < to; index += 1) {
      const row = rows[index];
      const position = (positions.get(row.gpu) ?? 0) + 1;
      positions.set(row.gpu, position);
      if (index < from) continue;
      drawn.push(html`<${Row} key=${row.workflowId} row=${row} position=${position} place=${index + 1} of=${rows.length}
        pool=${pools > 1 ? row.gpu : ""} actions=${actions} />`);
    }
    const space = { paddingTop: `${from * height}px`, paddingBottom: `${(rows.length - to) * height}px` };
    return html`<div ref=${this.element} class="rows" onScroll=${all ? null : this.measure}>
      <ol aria-label="Waiting workflows, the next one first" style=${space}>${drawn}</ol>
    </div>`;
  }
}

const Row = memo(({ row, position, place, of, pool, actions }) => {
  const name = nameOf(row);
  return html`<li class=${`row ${row.priority}`} data-id=${row.workflowId} aria-setsize=${of} aria-posinset=${place}>
    <span class="position" title="Position">${position}</span>
    <button class="name" type="button" title=${row.workflowId} onClick=${() => actions.details(row)}>${name}</button>
    <span class="eta">${row.etaSeconds != null ? `in ${about(row.etaSeconds)}` : `since ${clock(row.createdAt)}`}${pool ? ` · ${pool}` : ""}${row.attempt > 1 ? " · again" : ""}</span>
    <select aria-label=${`Priority of ${name}`} value=${row.priority} onChange=${(event) => actions.prioritize(row, event.target)}>
      <option value="high">high</option><option value="normal">normal</option><option value="low">low</option>
    </select>
    <button class="quiet square danger" type="button" aria-label=${`Cancel ${name}`} onClick=${() => actions.cancel(row)}><${Icon} name="close" /></button>
  </li>`;
});
