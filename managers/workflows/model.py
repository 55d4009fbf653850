"""A workflow, its states, and the moves between them.

Must never do I/O. The store refuses every move that `MOVES` does not list; nobody else decides what is legal.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from managers.events.types import Cost, ErrorType, Finding, NodeCounts, Output


class Status(StrEnum):
    """Where a workflow is (CONTRACT 4). The last three are final: a retry is a new workflow."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})

MOVES: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.FAILED, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.QUEUED, Status.COMPLETED, Status.FAILED, Status.CANCELLED}),
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


class AttemptState(StrEnum):
    """Where one posting to ComfyUI is. Open are POSTED and RUNNING: a restart reconciles exactly those."""

    POSTED = "posted"
    RUNNING = "running"
    ENDED = "ended"
    WITHDRAWN = "withdrawn"
    LOST = "lost"


OPEN = frozenset({AttemptState.POSTED, AttemptState.RUNNING})


class Priority(StrEnum):
    """The three classes a client may ask for."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


POISON_DEATHS = 2
"""So many ComfyUIs have died of a workflow when it is given up, whatever `max_attempts` says."""

ANY_BACKEND = "local"
"""The `gpu` value that every backend serves."""

_STRICT_CLASS_MS = 10**14  # more than any time of day in ms until the year 5138


def rank(priority: Priority, created_at: int, aging_seconds: float) -> int:
    """The place in the queue, smallest first: submit time + 0, A or 2A (CONTRACT 4). Never changes while it waits.

    `created_at` is epoch ms; with `aging_seconds` 0 a class always goes before the next.
    """
    step = round(aging_seconds * 1000) if aging_seconds > 0 else _STRICT_CLASS_MS
    return created_at + step * list(Priority).index(priority)


class Workflow(Struct, frozen=True, kw_only=True):
    """One accepted workflow as it is on disk. Times are epoch ms.

    `number` is the order of acceptance, `attempt` the number of the attempt in hand (0: none was posted yet);
    `timeout_seconds` counts from execution_start. `submitted_by` is the name of a key. No backend in
    `unfit` is to get it: it lacked a class of the graph, where another had all, when the workflow came in.
    `cost` is that of the attempts that ran and ended; None: there was none yet. `webhook_url` is whom its submitter
    wants called about it, and told to nobody: such URLs are secrets. It was made from its
    `template`, in that version.
    """

    id: str
    number: int
    status: Status
    priority: Priority
    gpu: str
    rank: int
    created_at: int
    max_attempts: int
    timeout_seconds: float
    attempt: int = 0
    backend: str | None = None
    prompt_id: str | None = None
    start_time: int | None = None
    completion_time: int | None = None
    progress: int = 0
    nodes: NodeCounts = NodeCounts()
    error: str | None = None
    error_type: ErrorType | None = None
    errors: tuple[Finding, ...] = ()
    outputs: tuple[Output, ...] = ()
    outputs_reused: bool = False
    metadata: dict[str, Any] | None = None
    retry_of: str | None = None
    submitted_by: str | None = None
    unfit: tuple[str, ...] = ()
    cost: Cost | None = None
    webhook_url: str | None = None
    template: str | None = None
    template_version: int | None = None

    @property
    def final(self) -> bool:
        """Nothing will change it any more."""
        return self.status in FINAL


class MadeFrom(Struct, frozen=True):
    """The version of a template that a graph was made from, and the values of its parameters, a JSON object."""

    template: str
    version: int
    parameters: bytes


class NewWorkflow(Struct, frozen=True, kw_only=True):
    """What a client handed in, checked and ready to be stored.

    `graph` and `extra_data` are JSON text. `failure` is set when the graph can run nowhere: it is stored as failed.
    """

    id: str
    graph: bytes
    priority: Priority
    gpu: str
    rank: int
    created_at: int
    max_attempts: int
    timeout_seconds: float
    extra_data: bytes | None = None
    metadata: dict[str, Any] | None = None
    errors: tuple[Finding, ...] = ()
    failure: str | None = None
    node_total: int = 0
    retry_of: str | None = None
    submitted_by: str | None = None
    unfit: tuple[str, ...] = ()
    webhook_url: str | None = None
    made_from: MadeFrom | None = None


class IdempotencyKey(Struct, frozen=True):
    """A client's promise that this is the same request: `scope` holds who asked which route, `body_hash` what."""

    scope: str
    key: str
    body_hash: str


class Submitted(Struct, frozen=True):
    """A workflow on disk, and its place when it was accepted. `replayed`: an earlier request had stored it.

    `status` and `errors` are what the first reply told, whatever became of it since.
    """

    workflow: Workflow
    queue_position: int
    status: Status
    errors: tuple[Finding, ...] = ()
    replayed: bool = False


class Attempt(Struct, frozen=True, kw_only=True):
    """One posting of a workflow to one ComfyUI. `prompt_id` is on disk before the POST leaves.

    `died`: that ComfyUI died while this was seen executing.
    """

    prompt_id: str
    workflow_id: str
    number: int
    backend: str
    state: AttemptState
    created_at: int
    start_time: int | None = None
    end_time: int | None = None
    error: str | None = None
    error_type: ErrorType | None = None
    died: bool = False


class Claimed(Struct, frozen=True):
    """A workflow with the attempt just stored for it, or found open after a restart, and what ComfyUI is to run."""

    workflow: Workflow
    attempt: Attempt
    graph: bytes
    extra_data: bytes | None


class Outcome(Struct, frozen=True, kw_only=True):
    """How an attempt ended, for the store. `start_time` fills in a start that nobody saw. Times are epoch ms.

    `progress` is how far it came (0..100), where it did not complete. `cost` is what this attempt took; None: nothing
    is known.
    """

    status: Status
    start_time: int | None
    completion_time: int
    outputs: tuple[Output, ...] = ()
    outputs_reused: bool = False
    nodes: NodeCounts | None = None
    progress: int | None = None
    error: str | None = None
    error_type: ErrorType | None = None
    errors: tuple[Finding, ...] = ()
    node_id: str | None = None
    node_type: str | None = None
    cost: Cost | None = None


CostOf = Callable[[str], Cost | None]
"""A workflow's id -> what its attempt in hand took, as it ended or so far; None: nothing is known. From memory."""


def added(before: Cost | None, attempt: Cost | None) -> Cost:
    """The cost of a workflow after one more attempt that ran. A value that is not known for one is not for all."""
    more = attempt or Cost()
    if before is None:
        return more
    peaks = (before.vram_peak_bytes, more.vram_peak_bytes)
    known = [peak for peak in peaks if peak is not UNSET]
    return Cost(
        gpu_seconds=_sum(before.gpu_seconds, more.gpu_seconds),
        vram_peak_bytes=max(known) if len(known) == len(peaks) else UNSET,
        energy_joules=_sum(before.energy_joules, more.energy_joules),
    )


def known(cost: Cost | None) -> Cost | None:
    """As it is told: None where nothing of it is known."""
    return None if cost == Cost() else cost


def _sum(one: float | UnsetType, other: float | UnsetType) -> float | UnsetType:
    return UNSET if one is UNSET or other is UNSET else round(one + other, 3)


def merged(before: tuple[Finding, ...], after: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """What was found at submit, then what the run said; ComfyUI's own word replaces ours about the same place."""
    said = {(finding.code, finding.pointer) for finding in after if finding.pointer}
    return tuple(finding for finding in before if (finding.code, finding.pointer) not in said) + after


class Filter(Struct, frozen=True, kw_only=True):
    """Which workflows a list shows; `since` is epoch ms of submission, `cursor` what the page before gave."""

    status: Status | None = None
    gpu: str | None = None
    error_type: ErrorType | None = None
    submitted_by: str | None = None
    since: int | None = None
    limit: int = 50
    cursor: str | None = None


class Page(Struct, frozen=True):
    """Some workflows, newest first, and where to go on."""

    workflows: tuple[Workflow, ...]
    next_cursor: str | None


class QueueCounts(Struct, frozen=True, kw_only=True):
    """The queue at a glance; `waiting` by priority, `oldest_created_at` of what waits (epoch ms)."""

    waiting: dict[Priority, int]
    running: int
    oldest_created_at: int | None
    paused: bool

    @property
    def length(self) -> int:
        """How many wait."""
        return sum(self.waiting.values())
