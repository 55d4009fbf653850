// The machinery: each ComfyUI, and the cards.

import { Component, createRef, html, memo, Progress } from "./ui.js";
import { gibibytes, nameOf } from "./words.js";
import { CHART_SECONDS } from "./model.js";

export const Backends = memo(({ backends, running, rows, actions }) => html`<section class="card machines" aria-labelledby="backends-title">
  <h2 id="backends-title">Backends</h2>
  <ul class="plain-list">${backends.map((one) => {
    const row = running.find((candidate) => candidate.backend === one.name);
    const doing = row ? `runs ${nameOf(row)}` : one.state === "connected" ? "idle" : (one.stallReason ?? "away");
    return html`<li class="backend" key=${one.name}>
      <span class=${`dot ${one.state}`} aria-hidden="true"></span>
      <div class="backend-words">
        <strong>${one.name}</strong> <span class="state">${one.state}${one.draining ? ", gets no work" : ""}</span>
        <span class="kind" title=${one.url}>${doing}${one.version ? ` · ComfyUI ${one.version}` : ""}</span>
      </div>
      <button class="quiet" type="button" aria-label=${`${one.draining ? "Resume" : "Drain"} ${one.name}`} onClick=${() => actions.drain(one.name, !one.draining)}>
        ${one.draining ? "Resume" : "Drain"}
      </button>
    </li>`;
  })}</ul>
</section>`);

const CHARTS = [
  { field: "utilization", title: "Utilization", colour: "--chart-1", most: () => 100, now: (gpu) => gpu.utilization, words: (v) => `${Math.round(v)} %` },
  { field: "memory", title: "VRAM", colour: "--chart-2", most: (gpu) => (gpu.memory ? gpu.memory.total / 1024 : null), now: (gpu) => gpu.memory?.used, words: (v, gpu) => `${gibibytes(v)} of ${gibibytes(gpu.memory.total)} GiB` },
  { field: "power", title: "Power", colour: "--chart-3", most: () => null, now: (gpu) => gpu.powerWatts, words: (v) => `${Math.round(v)} W` },
];

export const Gpus = memo(({ gpus, history, version, theme, error }) => html`<section class="card gpus" aria-labelledby="gpus-title">
  <h2 id="gpus-title">GPUs</h2>
  ${gpus.length === 0 && html`<p class="empty">${error ?? "No card tells of itself."}</p>`}
  ${gpus.map((gpu) => html`<article class="gpu" key=${gpu.gpuId} aria-label=${`GPU ${gpu.gpuId}`}>
    <h3>${gpu.name ?? `GPU ${gpu.gpuId}`} <span class="facts"><span>GPU ${gpu.gpuId}</span>${gpu.temperature != null && html`<span>${Math.round(gpu.temperature)} °C</span>`}</span></h3>
    <div class="charts">${CHARTS.map((chart) => {
      const value = chart.now(gpu);
      if (value == null) return null;
      return html`<figure class="chart" key=${chart.field}>
        <figcaption>${chart.title} <strong>${chart.words(value, gpu)}</strong></figcaption>
        <${Chart} points=${history.get(gpu.gpuId) ?? []} field=${chart.field} colour=${chart.colour} most=${chart.most(gpu)} version=${version} theme=${theme} label=${`${chart.title} of GPU ${gpu.gpuId} in the last 15 minutes`} />
      </figure>`;
    })}</div>
  </article>`)}
</section>`);

const HEIGHT = 72;

// 15 minutes of one value. The words beside it say what it is now; the drawing is for eyes.
class Chart extends Component {
  element = createRef();

  shouldComponentUpdate({ version, theme, most }) {
    const before = this.props;
    return version !== before.version || theme !== before.theme || most !== before.most;
  }

  componentDidMount() {
    this.make();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.element.current);
  }

  componentWillUnmount() {
    this.observer.disconnect();
    this.plot.destroy();
  }

  componentDidUpdate(before) {
    if (before.theme !== this.props.theme) {
      this.plot.destroy();
      this.make();
    } else this.plot.setData(this.data());
  }

  resize() {
    const width = this.element.current.clientWidth;
    if (width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  make() {
    const element = this.element.current;
    // A canvas understands no variables: what the browser makes of them.
    const colour = (name) => {
      element.style.color = `var(${name})`;
      return getComputedStyle(element).color;
    };
    const own = colour(this.props.colour);
    const grid = { stroke: colour("--chart-grid"), width: 1 };
    const axis = { stroke: colour("--chart-text"), font: "10px system-ui", grid, ticks: { show: false } };
    this.plot = new window.uPlot(
      {
        width: element.clientWidth || 200,
        height: HEIGHT,
        legend: { show: false },
        cursor: { show: false },
        padding: [6, 4, 0, 0],
        scales: {
          x: { time: true, range: () => [Date.now() / 1000 - CHART_SECONDS, Date.now() / 1000] },
          y: { range: (_, __, max) => [0, this.props.most ?? Math.max(10, max * 1.2)] },
        },
        axes: [
          { ...axis, size: 18, space: 60, values: (_, ticks) => ticks.map((t) => new Date(t * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })) },
          { ...axis, size: 34, space: 24 },
        ],
        series: [{}, { stroke: own, fill: own.replace("rgb(", "rgba(").replace(")", ", 0.14)"), width: 1.5, points: { show: false } }],
      },
      this.data(),
      element,
    );
  }

  data() {
    const { points, field } = this.props;
    const times = [];
    const values = [];
    for (const point of points) {
      // A hole where nothing was heard for long.
      if (times.length && point.t - times.at(-1) > 60) {
        times.push(point.t - 1);
        values.push(null);
      }
      times.push(point.t);
      values.push(point[field]);
    }
    return [times, values];
  }

  render({ label }) {
    return html`<div class="plot" ref=${this.element} role="img" aria-label=${label}></div>`;
  }
}
