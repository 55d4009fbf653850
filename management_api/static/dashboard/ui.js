// The parts that all rooms of the page use.

import { Component, createRef, h, render } from "./vendor/preact.mjs";
import htm from "./vendor/htm.mjs";
import { file } from "./api.js";

export const html = htm.bind(h);
export { Component, createRef, render };

// Draws again only when something it was given is another thing than before.
export function memo(draw) {
  return class extends Component {
    shouldComponentUpdate(next) {
      const before = this.props;
      for (const name in next) if (next[name] !== before[name]) return true;
      for (const name in before) if (!(name in next)) return true;
      return false;
    }

    render(props) {
      return draw(props);
    }
  };
}

// 0 to 1. What it says to ears is `text`.
export function Progress({ value, label, text, slim }) {
  const percent = Math.round(value * 100);
  return html`<div
    class=${slim ? "progress slim" : "progress"}
    role="progressbar"
    aria-label=${label}
    aria-valuemin="0"
    aria-valuemax="100"
    aria-valuenow=${percent}
    aria-valuetext=${text ?? `${percent} %`}
  ><div class="bar" style=${{ transform: `scaleX(${value})` }}></div></div>`;
}

// A modal: the browser keeps the focus inside, Escape closes it, and the focus goes back to where it was.
export class Dialog extends Component {
  element = createRef();

  componentDidMount() {
    this.element.current.showModal();
  }

  close = () => this.element.current?.close();

  render({ title, onClose, children, wide }) {
    return html`<dialog
      ref=${this.element}
      class=${wide ? "wide" : ""}
      aria-labelledby="dialog-title"
      onClose=${onClose}
      onClick=${(event) => event.target === this.element.current && this.close()}
    >
      <header class="dialog-head">
        <h2 id="dialog-title">${title}</h2>
        <button class="quiet square" type="button" aria-label="Close" onClick=${this.close}>
          <svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d="M6 6l12 12M18 6 6 18" /></svg>
        </button>
      </header>
      <div class="dialog-body">${typeof children === "function" ? children(this.close) : children}</div>
    </dialog>`;
  }
}

const LARGEST_THUMBNAIL = 32e6;

// A file of the service as a blob URL, fetched with the key when it comes into view, given back when it goes.
export class Picture extends Component {
  element = createRef();
  state = { url: null, failed: null };

  componentDidMount() {
    this.aborter = new AbortController();
    if (this.props.eager) return void this.load();
    this.observer = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      this.observer.disconnect();
      this.load();
    }, { rootMargin: "200px" });
    this.observer.observe(this.element.current);
  }

  componentWillUnmount() {
    this.aborter.abort();
    this.observer?.disconnect();
    if (this.state.url) URL.revokeObjectURL(this.state.url);
  }

  async load() {
    try {
      const blob = await file(this.props.src, this.aborter.signal);
      if (this.aborter.signal.aborted) return;
      if (!this.props.eager && blob.size > LARGEST_THUMBNAIL) return this.setState({ failed: "large" });
      this.setState({ url: URL.createObjectURL(blob) });
      this.props.onUrl?.(this.state.url);
    } catch (error) {
      if (!this.aborter.signal.aborted) this.setState({ failed: error.message });
    }
  }

  render({ alt, kind = "image" }, { url, failed }) {
    if (failed) return html`<span class="picture failed" ref=${this.element} role="img" aria-label=${alt}>${failed}</span>`;
    if (!url) return html`<span class="picture waiting" ref=${this.element} role="img" aria-label=${alt}></span>`;
    if (kind === "video") return html`<video class="picture" src=${url} controls loop aria-label=${alt}></video>`;
    if (kind === "audio") return html`<audio src=${url} controls aria-label=${alt}></audio>`;
    return html`<img class="picture" src=${url} alt=${alt} decoding="async" />`;
  }
}

// A picture that changes all the time: one URL at a time, the one before given back.
export class LivePicture extends Component {
  shouldComponentUpdate(next) {
    return next.blob !== this.props.blob;
  }

  componentWillUnmount() {
    URL.revokeObjectURL(this.url);
  }

  render({ blob, alt }) {
    if (blob !== this.blob) {
      this.drop();
      this.before = this.url;
      this.blob = blob;
      this.url = URL.createObjectURL(blob);
    }
    return html`<img class="preview" src=${this.url} alt=${alt} onLoad=${this.drop} onError=${this.drop} />`;
  }

  drop = () => {
    if (this.before) URL.revokeObjectURL(this.before);
    this.before = null;
  };
}
