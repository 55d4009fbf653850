// From a file to a workflow: JSON as ComfyUI exports it, or the prompt inside a picture that ComfyUI saved. Touches
// neither the network nor the document.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const HOW_TO_EXPORT = "In ComfyUI, choose Workflow → Export (API), and drop that file.";

export class NoWorkflow extends Error {}

// -> {workflow, priority?, gpu?, metadata?, nodes}. Raises NoWorkflow with words for people.
export async function read(file) {
  const data = new Uint8Array(await file.arrayBuffer());
  if (SIGNATURE.every((byte, index) => data[index] === byte)) return fromPicture(await textsOf(data));
  if (file.type.startsWith("image/") || /\.(jpe?g|webp|gif|avif)$/i.test(file.name)) {
    throw new NoWorkflow("Only PNG pictures of ComfyUI carry their workflow in a way this page can read.");
  }
  let value;
  try {
    value = parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
  } catch {
    throw new NoWorkflow("This is neither a workflow in JSON nor a PNG picture.");
  }
  return fromValue(value);
}

function fromPicture(texts) {
  const prompt = texts.get("prompt");
  if (prompt === undefined) {
    throw new NoWorkflow(
      texts.has("workflow")
        ? `This picture carries only the editor's format. Open it in ComfyUI. ${HOW_TO_EXPORT}`
        : "This picture carries no workflow: ComfyUI did not save it, or something has removed its metadata.",
    );
  }
  let value;
  try {
    value = parse(prompt);
  } catch {
    throw new NoWorkflow("The workflow in this picture is damaged.");
  }
  return fromValue(value);
}

function fromValue(value) {
  if (!isObject(value)) throw new NoWorkflow("This is not a workflow: it is not a JSON object.");
  if (isEditors(value)) throw new NoWorkflow(`This is the editor's format, which cannot be run. ${HOW_TO_EXPORT}`);
  // A whole request, of this service or of ComfyUI itself.
  for (const name of ["workflow", "prompt"]) {
    if (isObject(value[name]) && !("class_type" in value[name])) {
      if (isEditors(value[name])) throw new NoWorkflow(`This is the editor's format, which cannot be run. ${HOW_TO_EXPORT}`);
      const { priority, gpu, metadata } = value;
      return { ...check(value[name]), ...(name === "workflow" ? { priority, gpu, metadata } : {}) };
    }
  }
  return check(value);
}

function check(workflow) {
  const nodes = Object.values(workflow);
  if (nodes.length === 0 || !nodes.every((node) => isObject(node) && typeof node.class_type === "string")) {
    throw new NoWorkflow(`This is no workflow in API format: not every entry is a node. ${HOW_TO_EXPORT}`);
  }
  for (const node of nodes) delete node.is_changed; // ComfyUI's own note, made anew for each run
  return { workflow, nodes: nodes.length };
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isEditors = (value) => Array.isArray(value.nodes) && Array.isArray(value.links);

// JSON as Python writes it: NaN and Infinity are no JSON.
export function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return JSON.parse(text.replace(/"(?:[^"\\]|\\.)*"|-?\b(?:NaN|Infinity)\b/g, (found) => (found[0] === '"' ? found : "null")));
  }
}

// The texts of a PNG by their keywords: tEXt, zTXt and iTXt (PNG 11.3.3). Raises NoWorkflow when it is cut short.
export async function textsOf(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const texts = new Map();
  const latin = new TextDecoder("latin1");
  const utf8 = new TextDecoder();
  const short = () => new NoWorkflow("This picture is cut short.");
  for (let at = 8; ; ) {
    if (at + 12 > data.length) throw short();
    const length = view.getUint32(at);
    const kind = latin.decode(data.subarray(at + 4, at + 8));
    const body = data.subarray(at + 8, at + 8 + length);
    if (body.length < length) throw short();
    at += 12 + length;
    if (kind === "IEND") return texts;
    if (kind !== "tEXt" && kind !== "zTXt" && kind !== "iTXt") continue;
    const end = body.indexOf(0);
    const keyword = latin.decode(body.subarray(0, end));
    if (kind === "tEXt") texts.set(keyword, latin.decode(body.subarray(end + 1)));
    else if (kind === "zTXt") texts.set(keyword, latin.decode(await inflate(body.subarray(end + 2))));
    else {
      const packed = body[end + 1] === 1;
      const text = body.subarray(body.indexOf(0, body.indexOf(0, end + 3) + 1) + 1);
      texts.set(keyword, utf8.decode(packed ? await inflate(text) : text));
    }
  }
}

async function inflate(data) {
  try {
    const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new NoWorkflow("The workflow in this picture is damaged.");
  }
}
