// Made by `make definitions` from the service's types. Not to be edited.

/** One attempt of a workflow, for `?include=attempts`. */
export interface AttemptView {
  attempt: number;
  backend: string;
  promptId: string;
  state: string;
  createdAt: number;
  startTime: number | null;
  endTime: number | null;
  error: string | null;
  errorType: "backend" | "deadline" | "input" | "lost" | "node" | "oom" | "poison" | "timeout" | "validation" | null;
  died: boolean;
}

/** The socket to a ComfyUI is up. */
export interface BackendConnected {
  type: "backend:connected";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  backend: string;
  reason: string | null;
}

/** The socket to a ComfyUI is gone; work for it waits. */
export interface BackendDisconnected {
  type: "backend:disconnected";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  backend: string;
  reason: string | null;
}

/** A ComfyUI answers but does not work. Not `proven`: it is only silent for long, and trusted still. */
export interface BackendStalled {
  type: "backend:stalled";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  backend: string;
  reason: string | null;
  proven: boolean;
}

export type ClientFrame = Ping | Subscribe | Unsubscribe;

/** ComfyUI's own message as it came, on the `comfyui` channel; `type` is `comfyui:<name>`. */
export interface ComfyUIMessage {
  type: string;
  timestamp: number;
  backend: string;
  data: unknown;
  workflowId?: string;
}

/** What a workflow took of the cards it ran on; each value is absent where it is not known for all of it. `gpu_seconds`: the time, once for each card. `vram_peak_bytes`: the most that a sample showed. `energy_joules`: what the cards drew meanwhile. Of several attempts that ran: their sum, and the highest peak. */
export interface Cost {
  gpuSeconds?: number;
  vramPeakBytes?: number;
  energyJoules?: number;
}

/** One thing wrong with a request or a graph. `pointer` is a JSON pointer into the request body (RFC 6901). */
export interface Finding {
  code: string;
  message: string;
  pointer?: string;
  severity?: "error" | "warning";
  nodeId?: string | null;
  classType?: string | null;
  input?: string | null;
  allowed?: unknown;
  suggestions?: Array<string>;
}

/** These events were missed and are no longer kept. */
export interface Gap {
  type: "gap";
  from: number;
  to: number;
}

/** A sample of every GPU. */
export interface GpuSample {
  type: "gpu:sample";
  timestamp: number;
  workflowId?: string;
  gpus: Array<GpuView>;
}

/** A card as clients see it, in `gpu:sample` and in /v1/status. null: not known. */
export interface GpuView {
  gpuId: string;
  index: number;
  uuid: string | null;
  name: string | null;
  utilization: number | null;
  memory: MemoryView | null;
  temperature: number | null;
  powerWatts?: number;
  backend?: string;
}

/** We live; `seq` is the last stored event that was told, so a good `since`. */
export interface Heartbeat {
  type: "heartbeat";
  timestamp: number;
  seq: number;
}

/** A node has written outputs; more may come before the workflow ends. */
export interface ImagesGenerated {
  type: "images:generated";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  nodeId: string;
  outputs: Array<Output>;
}

/** Memory in MiB. */
export interface MemoryView {
  used: number;
  total: number;
  percentUsed: number;
}

/** How many nodes the run needs, has done, and found in ComfyUI's cache (cached ones count as done). */
export interface NodeCounts {
  total: number;
  done: number;
  cached: number;
}

/** A node ended, or was found in the cache; `output` as ComfyUI sent it, where it had one. */
export interface NodeExecuted {
  type: "node:executed";
  timestamp: number;
  workflowId?: string;
  nodeId: string;
  displayNodeId: string;
  parentNodeId: string | null;
  realNodeId: string | null;
  nodeType: string | null;
  nodeName: string | null;
  nodeState: "cached" | "finished" | "running";
  nodeProgress: number | null;
  nodeMaxProgress: number | null;
  nodePercentage: number | null;
  message: string | null;
  output: unknown;
}

/** A node began. */
export interface NodeExecuting {
  type: "node:executing";
  timestamp: number;
  workflowId?: string;
  nodeId: string;
  displayNodeId: string;
  parentNodeId: string | null;
  realNodeId: string | null;
  nodeType: string | null;
  nodeName: string | null;
  nodeState: "cached" | "finished" | "running";
  nodeProgress: number | null;
  nodeMaxProgress: number | null;
  nodePercentage: number | null;
  message: string | null;
}

/** A node made a step. */
export interface NodeProgressed {
  type: "node:progress";
  timestamp: number;
  workflowId?: string;
  nodeId: string;
  displayNodeId: string;
  parentNodeId: string | null;
  realNodeId: string | null;
  nodeType: string | null;
  nodeName: string | null;
  nodeState: "cached" | "finished" | "running";
  nodeProgress: number | null;
  nodeMaxProgress: number | null;
  nodePercentage: number | null;
  message: string | null;
}

/** A node that the run needs, for `?include=nodes`. `seconds` of a running one are those so far. `pending`: it has not run. `stopped`: the run ended in the middle of it. A time that nobody saw is null. */
export interface NodeTimeView {
  nodeId: string;
  nodeName: string;
  nodeType: string;
  state: "cached" | "done" | "pending" | "running" | "stopped";
  startTime: number | null;
  seconds: number | null;
}

/** One result of a run: a file in ComfyUI's folders, or a text (PROTOCOL §4). `size` is in bytes and `etag` names the bytes, None when nobody could tell; `url` is relative to this service. `extra` holds what the node said beyond that (frame rate, format). Once it is in a bucket (`key`, `sha256`), `url` leads there until `url_expires_at` (epoch ms; None: it does not end), and `local_url` is what `url` was before. */
export interface Output {
  kind: "3d" | "audio" | "file" | "image" | "latent" | "text" | "video";
  nodeId: string;
  filename?: string | null;
  subfolder?: string | null;
  type?: string | null;
  size?: number | null;
  contentType?: string | null;
  etag?: string | null;
  text?: string | null;
  url?: string | null;
  urlExpiresAt?: number | null;
  localUrl?: string | null;
  key?: string | null;
  sha256?: string | null;
  extra?: Record<string, unknown> | null;
}

/** A client's own sign of life. */
export interface Ping {
  type: "ping";
}

/** The answer to a ping. Epoch ms. */
export interface Pong {
  type: "pong";
  timestamp: number;
}

/** A preview for clients that take no binary frames; `image` goes out in base64. */
export interface PreviewText {
  type: "preview";
  workflowId: string;
  timestamp: number;
  promptId: string;
  nodeId: string | null;
  displayNodeId: string | null;
  mime: string;
  image: string;
}

/** How long the queue is. */
export interface QueueStatus {
  type: "queue:status";
  timestamp: number;
  workflowId?: string;
  length: number;
  running: number;
  paused: boolean;
}

/** The answer to a bad frame. */
export interface Refused {
  type: "error";
  code: string;
  message: string;
}

/** Where a workflow is (CONTRACT 4). The last three are final: a retry is a new workflow. */
export type Status = "cancelled" | "completed" | "failed" | "queued" | "running";

/** A base class for defining efficient serializable objects. Fields are defined using type annotations. Fields may optionally have default values, which result in keyword parameters to the constructor. Structs automatically define ``__init__``, ``__eq__``, ``__repr__``, and ``__copy__`` methods. Additional methods can be defined on the class as needed. Note that ``__init__``/``__new__`` cannot be overridden, but other methods can. A tuple of the field names is available on the class via the ``__struct_fields__`` attribute if needed. Additional class options can be enabled by passing keywords to the class definition (see example below). These configuration options may also be inspected at runtime through the ``__struct_config__`` attribute. Configuration ------------- frozen: bool, default False Whether instances of this type are pseudo-immutable. If true, attribute assignment is disabled and a corresponding ``__hash__`` is defined. order: bool, default False If True, ``__lt__``, `__le__``, ``__gt__``, and ``__ge__`` methods will be generated for this type. eq: bool, default True If True (the default), an ``__eq__`` method will be generated for this type. Set to False to compare based on instance identity alone. kw_only: bool, default False If True, all fields will be treated as keyword-only arguments in the generated ``__init__`` method. Default is False. omit_defaults: bool, default False Whether fields should be omitted from encoding if the corresponding value is the default for that field. Enabling this may reduce message size, and often also improve encoding & decoding performance. forbid_unknown_fields: bool, default False If True, an error is raised if an unknown field is encountered while decoding structs of this type. If False (the default), no error is raised and the unknown field is skipped. tag: str, int, bool, callable, or None, default None Used along with ``tag_field`` for configuring tagged union support. If either are non-None, then the struct is considered "tagged". In this case, an extra field (the ``tag_field``) and value (the ``tag``) are added to the encoded message, which can be used to differentiate message types during decoding. Set ``tag=True`` to enable the default tagged configuration (``tag_field`` is ``"type"``, ``tag`` is the class name). Alternatively, you can provide a string (or less commonly int) value directly to be used as the tag (e.g. ``tag="my-tag-value"``).``tag`` can also be passed a callable that takes the class qualname and returns a valid tag value (e.g. ``tag=str.lower``). See the docs for more information. tag_field: str or None, default None The field name to use for tagged union support. If ``tag`` is non-None, then this defaults to ``"type"``. See the ``tag`` docs above for more information. rename: str, mapping, callable, or None, default None Controls renaming the field names used when encoding/decoding the struct. May be one of ``"lower"``, ``"upper"``, ``"camel"``, ``"pascal"``, or ``"kebab"`` to rename in lowercase, UPPERCASE, camelCase, PascalCase, or kebab-case respectively. May also be a mapping from field names to the renamed names (missing fields are not renamed). Alternatively, may be a callable that takes the field name and returns a new name or ``None`` to not rename that field. Default is ``None`` for no field renaming. repr_omit_defaults: bool, default False Whether fields should be omitted from the generated repr if the corresponding value is the default for that field. array_like: bool, default False If True, this struct type will be treated as an array-like type during encoding/decoding, rather than a dict-like type (the default). This may improve performance, at the cost of a more inscrutable message encoding. gc: bool, default True Whether garbage collection is enabled for this type. Disabling this *may* help reduce GC pressure, but will prevent reference cycles composed of only ``gc=False`` from being collected. It is the user's responsibility to ensure that reference cycles don't occur when setting ``gc=False``. weakref: bool, default False Whether instances of this type support weak references. Defaults to False. dict: bool, default False Whether instances of this type will include a ``__dict__``. Setting this to True will allow adding additional undeclared attributes to a struct instance, which may be useful for holding private runtime state. Defaults to False. cache_hash: bool, default False If enabled, the hash of a frozen struct instance will be computed at most once, and then cached on the instance for further reuse. For expensive hash values this can improve performance at the cost of a small amount of memory usage. Examples -------- Here we define a new `Struct` type for describing a dog. It has three fields; two required and one optional. >>> class Dog(Struct): ... name: str ... breed: str ... is_good_boy: bool = True ... >>> Dog('snickers', breed='corgi') Dog(name='snickers', breed='corgi', is_good_boy=True) Additional struct options can be set as part of the class definition. Here we define a new `Struct` type for a frozen `Point` object. >>> class Point(Struct, frozen=True): ... x: float ... y: float ... >>> {Point(1.5, 2.0): 1} # frozen structs are hashable {Point(x=1.5, y=2.0): 1} */
export interface Struct {
}

/** Hear these workflows; `channels` replaces the channels; `since` asks for what was missed after that seq. `preview_format` chooses between ComfyUI's binary frames and base64 in JSON for the `preview` channel. With `names` old, `upload:completed` comes as `upload_complete`, as clients of older services know it. */
export interface Subscribe {
  type: "subscribe";
  workflowId?: string | Array<string> | null;
  channels?: Array<"backend" | "comfyui" | "gpu" | "node" | "preview" | "queue" | "workflow"> | null;
  since?: number | null;
  previewFormat?: "binary" | "json" | null;
  names?: "new" | "old" | null;
}

/** What the socket hears from now on (`workflowIds` null: all), and how things are as of `seq`. */
export interface Subscribed {
  type: "subscribed";
  workflowIds: Array<string> | null;
  channels: Array<"backend" | "comfyui" | "gpu" | "node" | "preview" | "queue" | "workflow">;
  seq: number;
  snapshot: Array<WorkflowView>;
}

/** Hear these no more; naming neither workflows nor channels means all of them. */
export interface Unsubscribe {
  type: "unsubscribe";
  workflowId?: string | Array<string> | null;
  channels?: Array<"backend" | "comfyui" | "gpu" | "node" | "preview" | "queue" | "workflow"> | null;
}

/** What the socket still hears. */
export interface Unsubscribed {
  type: "unsubscribed";
  workflowIds: Array<string> | null;
  channels: Array<"backend" | "comfyui" | "gpu" | "node" | "preview" | "queue" | "workflow">;
  seq: number;
}

/** The n-th output of a run is in the bucket. Links are made when it is told: what is stored has none. */
export interface UploadCompleted {
  type: "upload:completed";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  n: number;
  output: Output;
  url: string | null;
  urlExpiresAt: number | null;
}

/** The n-th output of a run will never be in the bucket, because it is gone. */
export interface UploadFailed {
  type: "upload:failed";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  n: number;
  output: Output;
  error: string;
  url: string | null;
}

/** It was cancelled; the verdict stands even while ComfyUI still stops. */
export interface WorkflowCancelled {
  type: "workflow:cancelled";
  timestamp: number;
  workflowId?: string;
  seq?: number;
}

/** It succeeded. `duration` is in seconds, from execution_start to the end ComfyUI named. */
export interface WorkflowCompleted {
  type: "workflow:completed";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  duration: number;
  outputs: Array<Output>;
  outputsReused: boolean;
  errors: Array<Finding>;
  backend: string | null;
  gpu: string | null;
  cost: Cost | null;
}

/** An attempt failed. With `will_retry` the workflow waits again; without, it has failed for good. */
export interface WorkflowError {
  type: "workflow:error";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  error: string;
  errorType: "backend" | "deadline" | "input" | "lost" | "node" | "oom" | "poison" | "timeout" | "validation";
  errors: Array<Finding>;
  nodeId: string | null;
  nodeType: string | null;
  willRetry: boolean;
  duration: number | null;
}

/** Where a running workflow is. `progress` is 0..100 and never goes back within an attempt. Half of such workflows end within `eta_seconds` from now, nine of ten within `eta_p90_seconds`. */
export interface WorkflowProgress {
  type: "workflow:progress";
  timestamp: number;
  workflowId?: string;
  progress: number;
  currentNode: string | null;
  currentNodeId: string | null;
  currentNodeType: string | null;
  step: number | null;
  steps: number | null;
  message: string | null;
  nodes: NodeCounts;
  etaSeconds: number | null;
  etaP90Seconds: number | null;
}

/** Accepted, or waiting again after its attempt was lost (`attempt` > 0 then). */
export interface WorkflowQueued {
  type: "workflow:queued";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  queuePosition: number;
  priority: string;
  gpu: string;
  attempt: number;
}

/** ComfyUI began to execute it. `started_before`: an earlier attempt of it had begun too, and was lost. */
export interface WorkflowStarted {
  type: "workflow:started";
  timestamp: number;
  workflowId?: string;
  seq?: number;
  backend: string;
  attempt: number;
  startTime: number;
  createdAt: number | null;
  priority: string | null;
  gpu: string | null;
  startedBefore: boolean;
}

/** The reply to GET /v1/comfyui/workflow/{id}, and an entry of lists and snapshots. */
export interface WorkflowView {
  workflowId: string;
  status: Status;
  progress: number;
  currentNode: string | null;
  startTime: number | null;
  completionTime: number | null;
  outputs: Array<Output>;
  error: string | null;
  priority: string;
  gpu: string;
  backend: string | null;
  createdAt: number;
  queuePosition: number | null;
  attempt: number;
  errors: Array<Finding>;
  errorType: "backend" | "deadline" | "input" | "lost" | "node" | "oom" | "poison" | "timeout" | "validation" | null;
  nodes: NodeCounts;
  currentNodeId: string | null;
  currentNodeType: string | null;
  step: number | null;
  steps: number | null;
  message: string | null;
  etaSeconds: number | null;
  etaP90Seconds: number | null;
  outputsReused: boolean;
  metadata: Record<string, unknown> | null;
  promptId: string | null;
  maxAttempts: number;
  timeoutSeconds: number;
  retryOf: string | null;
  submittedBy: string | null;
  cost: Cost | null;
  template?: string;
  templateVersion?: number;
  parameters?: unknown;
  workflow?: unknown;
  attempts?: Array<AttemptView>;
  nodeTimes?: Array<NodeTimeView>;
}

export type Frame = WorkflowQueued | WorkflowStarted | WorkflowCompleted | WorkflowCancelled | WorkflowError | ImagesGenerated | UploadCompleted | UploadFailed | BackendConnected | BackendDisconnected | BackendStalled | WorkflowProgress | NodeExecuting | NodeProgressed | NodeExecuted | QueueStatus | GpuSample | ComfyUIMessage | PreviewText | Pong | Heartbeat | Subscribed | Unsubscribed | Refused | Gap;
