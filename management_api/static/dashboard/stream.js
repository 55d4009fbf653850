// The live stream: a ticket for each connection, `since` for what was missed, back-off between attempts.

import { Refused, ticket } from "./api.js";

const CHANNELS = ["workflow", "node", "preview", "queue", "gpu", "backend"];
const FIRST_MS = 500;
const LONGEST_MS = 15_000;
const SILENCE_MS = 75_000; // a heartbeat comes each 30 s

export class Stream {
  // `on.state({connected, retryAt, reason})`, `on.event(event)`, `on.preview(metadata, blob)`; `seq()`: the last
  // stored event that is known, or null.
  constructor(on, seq) {
    this.on = on;
    this.seq = seq;
    this.socket = null;
    this.timer = null;
    this.failures = 0;
    this.stopped = true;
    this.run = 0;
  }

  start() {
    this.stopped = false;
    this.connect();
  }

  stop() {
    this.stopped = true;
    this.run += 1;
    clearTimeout(this.timer);
    this.socket?.close();
    this.socket = null;
  }

  // Do not wait any longer.
  now() {
    if (this.stopped || this.socket || !this.timer) return;
    clearTimeout(this.timer);
    this.connect();
  }

  async connect() {
    this.timer = null;
    const run = (this.run += 1);
    let given;
    try {
      given = (await ticket()).ticket;
    } catch (error) {
      if (run !== this.run) return;
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
        this.stop();
        this.on.state({ connected: false, refused: error });
        return;
      }
      this.again(error.message, error.retryAfter);
      return;
    }
    if (run !== this.run) return;
    const address = new URL("/v1/comfyui/stream", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    address.searchParams.set("ticket", given);
    const since = this.seq();
    if (since !== null) address.searchParams.set("since", since);
    const socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => socket.send(JSON.stringify({ type: "subscribe", channels: CHANNELS }));
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      this.heard();
      if (typeof data !== "string") return this.preview(data);
      const event = JSON.parse(data);
      if (event.type === "subscribed") {
        this.failures = 0;
        this.on.state({ connected: true });
      }
      this.on.event(event);
    };
    socket.onclose = ({ code, reason }) => {
      if (socket === this.socket) this.again(reason || (code === 1001 ? "The service stops" : "Connection lost"));
    };
    this.heard();
  }

  heard() {
    clearTimeout(this.silence);
    const socket = this.socket;
    this.silence = setTimeout(() => {
      if (socket !== this.socket) return;
      socket.onclose = null; // it may never come
      socket.close();
      this.again("The service is silent");
    }, SILENCE_MS);
  }

  again(reason, retryAfter = null) {
    clearTimeout(this.silence);
    this.socket = null;
    if (this.stopped) return;
    const longest = Math.min(LONGEST_MS, FIRST_MS * 2 ** this.failures);
    const wait = retryAfter ? retryAfter * 1000 : longest * (0.5 + Math.random() / 2);
    this.failures += 1;
    this.timer = setTimeout(() => this.connect(), wait);
    this.on.state({ connected: false, retryAt: Date.now() + wait, reason });
  }

  // ComfyUI's format 4: two lengths, what it is about, the picture.
  preview(data) {
    const view = new DataView(data);
    if (data.byteLength < 8 || view.getUint32(0) !== 4) return;
    const length = view.getUint32(4);
    const about = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 8, length)));
    this.on.preview(about, new Blob([new Uint8Array(data, 8 + length)], { type: about.image_type }));
  }
}
