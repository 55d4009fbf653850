// Small drawings, 24 by 24, in the colour of the text around them.

import { html } from "./ui.js";

const PATHS = {
  sampler: "M4 18c3 0 3-12 6-12s3 12 6 12 3-6 4-6M4 21h16",
  model: "M12 3 4 7v10l8 4 8-4V7zM4 7l8 4 8-4M12 11v10",
  text: "M5 6V4h14v2M12 4v16M9 20h6",
  latent: "M4 4h6v6H4zM14 4h6v6h-6zM4 14h6v6H4zM14 14h6v6h-6z",
  vae: "M4 5l7 7-7 7M20 5l-7 7 7 7",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15 9h.01",
  save: "M12 4v11M8 11l4 4 4-4M4 20h16",
  upscale: "M14 4h6v6M20 4l-8 8M4 10v10h10",
  mask: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  control: "M6 4v16M6 9h.01M12 4v16M12 15h.01M18 4v16M18 7h.01",
  video: "M4 6h11v12H4zM15 10l5-3v10l-5-3",
  audio: "M9 18V6l10-2v12M9 18a2.5 2.5 0 1 1-5 0 2.5 2.5 0 0 1 5 0zM19 16a2.5 2.5 0 1 1-5 0 2.5 2.5 0 0 1 5 0z",
  wait: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zM12 8v4l3 2",
  node: "M5 8h14v8H5zM2 12h3M19 12h3",
  done: "M5 12l5 5 9-10",
  cached: "M13 3 5 14h6l-1 7 8-11h-6z",
  close: "M6 6l12 12M18 6 6 18",
  again: "M20 5v5h-5M19.5 10A8 8 0 1 0 20 14",
  pause: "M8 5v14M16 5v14",
  play: "M7 5l12 7-12 7z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5 19 19M19 5l-1.5 1.5M6.5 17.5 5 19",
  moon: "M20 14A8 8 0 0 1 10 4a8 8 0 1 0 10 10z",
  plus: "M12 5v14M5 12h14",
  leave: "M14 5h5v14h-5M4 12h10M10 8l4 4-4 4",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  file: "M6 3h8l4 4v14H6zM14 3v4h4",
};

// By the name of the class; the first that fits.
const KINDS = [
  [/sleep|wait|delay/i, "wait"],
  [/sampler|scheduler|sigmas|guider|noise/i, "sampler"],
  [/controlnet|ipadapter|control/i, "control"],
  [/checkpoint|lora|unet|clip.*loader|vaeloader|model|diffus/i, "model"],
  [/upscale/i, "upscale"],
  [/mask|segment/i, "mask"],
  [/video|animat|webm|webp|gif/i, "video"],
  [/audio|music|speech/i, "audio"],
  [/save|preview/i, "save"],
  [/vae/i, "vae"],
  [/latent/i, "latent"],
  [/image|picture|photo/i, "image"],
  [/text|string|prompt|clip|conditioning/i, "text"],
];

export function kindOf(classType) {
  return KINDS.find(([pattern]) => pattern.test(classType ?? ""))?.[1] ?? "node";
}

export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false"><path d=${PATHS[name]} /></svg>`;
}

export const NodeIcon = ({ type }) => html`<${Icon} name=${kindOf(type)} />`;
