"""Every event a client can hear (CONTRACT 6), and the values they are made of.

Must never hold behaviour: these are shapes. `Stored` events get their `seq` from the store, in commit order;
all others carry none and may be dropped or merged on the way.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

Channel = Literal["workflow", "node", "comfyui", "preview", "queue", "gpu", "backend"]
CHANNELS: tuple[Channel, ...] = ("workflow", "node", "comfyui", "preview", "queue", "gpu", "backend")

ErrorType = Literal["validation", "input", "oom", "node", "timeout", "deadline", "lost", "poison", "backend"]
OutputKind = Literal["image", "video", "audio", "3d", "latent", "file", "text"]


class Finding(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One thing wrong with a request or a graph. `pointer` is a JSON pointer into the request body (RFC 6901)."""

    code: str
    message: str
    pointer: str = ""
    severity: Literal["error", "warning"] = "error"
    node_id: str | None = None
    class_type: str | None = None
    input: str | None = None
    allowed: Any = None
    suggestions: tuple[str, ...] = ()


class Output(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One result of a run: a file in ComfyUI's folders, or a text (PROTOCOL §4).

    `size` is in bytes and `etag` names the bytes, None when nobody could tell; `url` is relative to this service.
    `extra` holds what the node said beyond that (frame rate, format).

    Once it is in a bucket (`key`, `sha256`), `url` leads there until `url_expires_at` (epoch ms; None: it does not
    end), and `local_url` is what `url` was before.
    """

    kind: OutputKind
    node_id: str
    filename: str | None = None
    subfolder: str | None = None
    type: str | None = None
    size: int | None = None
    content_type: str | None = None
    etag: str | None = None
    text: str | None = None
    url: str | None = None
    url_expires_at: int | None = None
    local_url: str | None = None
    key: str | None = None
    sha256: str | None = None
    extra: dict[str, Any] | None = None


class NodeCounts(Struct, frozen=True, kw_only=True, rename="camel"):
    """How many nodes the run needs, has done, and found in ComfyUI's cache (cached ones count as done)."""

    total: int = 0
    done: int = 0
    cached: int = 0


class Cost(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What a workflow took of the cards it ran on; each value is absent where it is not known for all of it.

    `gpu_seconds`: the time, once for each card. `vram_peak_bytes`: the most that a sample showed. `energy_joules`:
    what the cards drew meanwhile. Of several attempts that ran: their sum, and the highest peak.
    """

    gpu_seconds: float | UnsetType = UNSET
    vram_peak_bytes: int | UnsetType = UNSET
    energy_joules: float | UnsetType = UNSET


class Event(Struct, frozen=True, kw_only=True, tag_field="type", rename="camel"):
    """What every event says: its `type` (the tag), when (epoch ms), and about which workflow."""

    channel: ClassVar[Channel] = "workflow"

    timestamp: int
    workflow_id: str | UnsetType = UNSET


class StoredEvent(Event, frozen=True, kw_only=True):
    """An event that is on disk before anybody hears it. `seq` is given by the store."""

    seq: int | UnsetType = UNSET


class WorkflowQueued(StoredEvent, frozen=True, kw_only=True, tag="workflow:queued"):
    """Accepted, or waiting again after its attempt was lost (`attempt` > 0 then)."""

    queue_position: int
    priority: str
    gpu: str
    attempt: int = 0


class WorkflowStarted(StoredEvent, frozen=True, kw_only=True, tag="workflow:started"):
    """ComfyUI began to execute it. `started_before`: an earlier attempt of it had begun too, and was lost."""

    backend: str
    attempt: int
    start_time: int
    created_at: int | None = None
    priority: str | None = None
    gpu: str | None = None
    started_before: bool = False


class WorkflowCompleted(StoredEvent, frozen=True, kw_only=True, tag="workflow:completed"):
    """It succeeded. `duration` is in seconds, from execution_start to the end ComfyUI named."""

    duration: float
    outputs: tuple[Output, ...]
    outputs_reused: bool
    errors: tuple[Finding, ...] = ()
    backend: str | None = None
    gpu: str | None = None
    cost: Cost | None = None


class WorkflowCancelled(StoredEvent, frozen=True, kw_only=True, tag="workflow:cancelled"):
    """It was cancelled; the verdict stands even while ComfyUI still stops."""


class WorkflowError(StoredEvent, frozen=True, kw_only=True, tag="workflow:error"):
    """An attempt failed. With `will_retry` the workflow waits again; without, it has failed for good."""

    error: str
    error_type: ErrorType
    errors: tuple[Finding, ...] = ()
    node_id: str | None = None
    node_type: str | None = None
    will_retry: bool = False
    duration: float | None = None


class ImagesGenerated(StoredEvent, frozen=True, kw_only=True, tag="images:generated"):
    """A node has written outputs; more may come before the workflow ends."""

    node_id: str
    outputs: tuple[Output, ...]


class UploadCompleted(StoredEvent, frozen=True, kw_only=True, tag="upload:completed"):
    """The n-th output of a run is in the bucket. Links are made when it is told: what is stored has none."""

    n: int
    output: Output
    url: str | None = None
    url_expires_at: int | None = None


class UploadFailed(StoredEvent, frozen=True, kw_only=True, tag="upload:failed"):
    """The n-th output of a run will never be in the bucket, because it is gone."""

    n: int
    output: Output
    error: str
    url: str | None = None


class BackendConnected(StoredEvent, frozen=True, kw_only=True, tag="backend:connected"):
    """The socket to a ComfyUI is up."""

    channel: ClassVar[Channel] = "backend"

    backend: str
    reason: str | None = None


class BackendDisconnected(StoredEvent, frozen=True, kw_only=True, tag="backend:disconnected"):
    """The socket to a ComfyUI is gone; work for it waits."""

    channel: ClassVar[Channel] = "backend"

    backend: str
    reason: str | None = None


class BackendStalled(StoredEvent, frozen=True, kw_only=True, tag="backend:stalled"):
    """A ComfyUI answers but does not work. Not `proven`: it is only silent for long, and trusted still."""

    channel: ClassVar[Channel] = "backend"

    backend: str
    reason: str | None = None
    proven: bool = True


class WorkflowProgress(Event, frozen=True, kw_only=True, tag="workflow:progress"):
    """Where a running workflow is. `progress` is 0..100 and never goes back within an attempt.

    Half of such workflows end within `eta_seconds` from now, nine of ten within `eta_p90_seconds`.
    """

    progress: int
    current_node: str | None
    current_node_id: str | None
    current_node_type: str | None
    step: int | None
    steps: int | None
    message: str | None
    nodes: NodeCounts
    eta_seconds: float | None = None
    eta_p90_seconds: float | None = None


class NodeEvent(Event, frozen=True, kw_only=True):
    """What the three node events share. Ids as ComfyUI gives them: an expanded node has a display and a parent id."""

    channel: ClassVar[Channel] = "node"

    node_id: str
    display_node_id: str
    parent_node_id: str | None = None
    real_node_id: str | None = None
    node_type: str | None = None
    node_name: str | None = None
    node_state: Literal["running", "finished", "cached"] = "running"
    node_progress: float | None = None
    node_max_progress: float | None = None
    node_percentage: int | None = None
    message: str | None = None


class NodeExecuting(NodeEvent, frozen=True, kw_only=True, tag="node:executing"):
    """A node began."""


class NodeProgressed(NodeEvent, frozen=True, kw_only=True, tag="node:progress"):
    """A node made a step."""


class NodeExecuted(NodeEvent, frozen=True, kw_only=True, tag="node:executed"):
    """A node ended, or was found in the cache; `output` as ComfyUI sent it, where it had one."""

    output: Any = None


class QueueStatus(Event, frozen=True, kw_only=True, tag="queue:status"):
    """How long the queue is."""

    channel: ClassVar[Channel] = "queue"

    length: int
    running: int
    paused: bool


class MemoryView(Struct, frozen=True, kw_only=True, rename="camel"):
    """Memory in MiB."""

    used: int
    total: int
    percent_used: float


class GpuView(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A card as clients see it, in `gpu:sample` and in /v1/status. null: not known."""

    gpu_id: str
    index: int
    uuid: str | None
    name: str | None
    utilization: float | None
    memory: MemoryView | None
    temperature: float | None
    power_watts: float | UnsetType = UNSET
    backend: str | UnsetType = UNSET


class GpuSample(Event, frozen=True, kw_only=True, tag="gpu:sample"):
    """A sample of every GPU."""

    channel: ClassVar[Channel] = "gpu"

    gpus: tuple[GpuView, ...]


class ComfyUIMessage(Struct, frozen=True, kw_only=True, rename="camel"):
    """ComfyUI's own message as it came, on the `comfyui` channel; `type` is `comfyui:<name>`."""

    channel: ClassVar[Channel] = "comfyui"

    type: str
    timestamp: int
    backend: str
    data: msgspec.Raw
    workflow_id: str | UnsetType = UNSET


class Preview(Struct, frozen=True, kw_only=True, rename="camel"):
    """A picture of a step, never stored. `image` is JPEG or PNG bytes; `node_id` None when ComfyUI did not say."""

    channel: ClassVar[Channel] = "preview"

    timestamp: int
    workflow_id: str
    prompt_id: str
    node_id: str | None
    display_node_id: str | None
    mime: str
    image: bytes


AnyStoredEvent = (
    WorkflowQueued
    | WorkflowStarted
    | WorkflowCompleted
    | WorkflowCancelled
    | WorkflowError
    | ImagesGenerated
    | UploadCompleted
    | UploadFailed
    | BackendConnected
    | BackendDisconnected
    | BackendStalled
)
LiveEvent = Event | ComfyUIMessage | Preview
